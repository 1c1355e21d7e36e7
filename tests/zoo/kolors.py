"""Kolors: text, image and PAG pipelines, with its ChatGLM encoder left out where embeddings can be passed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import diffusers
import torch
from transformers import BatchEncoding

from . import Case, autoencoder_kl, image, noise

SIZE = {"height": 16, "width": 24}
HIDDEN = 16
MODULES = {
    "KolorsPipeline": "kolors.pipeline_kolors",
    "KolorsImg2ImgPipeline": "kolors.pipeline_kolors_img2img",
    "KolorsPAGPipeline": "pag.pipeline_pag_kolors",
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.014, "beta_schedule": "scaled_linear", "num_train_timesteps": 1100}


class Letters:
    """A stand-in for ChatGLM's tokenizer, which wants a file and sentencepiece."""

    def __call__(self, text: str | list[str], max_length: int, **_: Any) -> BatchEncoding:
        texts = [text] if isinstance(text, str) else text
        ids = torch.tensor([[ord(letter) % 32 for letter in one.rjust(max_length)[-max_length:]] for one in texts])
        positions = torch.arange(max_length).expand_as(ids)
        return BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long(), "position_ids": positions})


def encoder() -> dict[str, Any]:
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    config = ChatGLMConfig(
        num_layers=2, padded_vocab_size=32, hidden_size=HIDDEN, ffn_hidden_size=16, kv_channels=8,
        num_attention_heads=2, seq_length=256, multi_query_attention=True, original_rope=True,
    )  # fmt: skip
    model = ChatGLMModel(config, empty_init=False).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)  # it leaves some unset
    return {"text_encoder": model, "tokenizer": Letters()}


def build(name: str, scheduler: str, encoder: Callable[[], dict[str, Any]] = dict, **config: Any) -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, encoder_hid_dim=HIDDEN, encoder_hid_dim_type="text_proj", attention_head_dim=(2, 4),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + HIDDEN, norm_num_groups=4,
    )  # fmt: skip
    native = getattr(diffusers, scheduler)(**BETAS, **config)
    # Without sentencepiece, which only the tokenizer needs, diffusers itself has but placeholders of the classes.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the encoder's module uses torch.jit.script
        cls = getattr(import_module(f"diffusers.pipelines.{MODULES[name]}"), name)
    encoders = {"text_encoder": None, "tokenizer": None} | encoder()
    pipe = cls(unet=unet.eval(), scheduler=native, vae=autoencoder_kl().eval(), **encoders)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text() -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 8, HIDDEN),
        "pooled_prompt_embeds": noise(1, HIDDEN, seed=1),
        "negative_prompt_embeds": noise(1, 8, HIDDEN, seed=2),
        "negative_pooled_prompt_embeds": noise(1, HIDDEN, seed=3),
    } | SIZE


def img2img() -> dict[str, Any]:
    # The pipeline takes embeddings, but loses the pooled ones.
    return {"prompt": "a cat", "negative_prompt": "a dog", "image": image(16, 24), "strength": 0.7}


def case(name: str, call: Callable[[], dict[str, Any]], task: Any = "text", **config: Any) -> Case:
    return Case(name, partial(build, name, **config), call, ("unet",), task)


EULER: dict[str, Any] = {"scheduler": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1}
DPM: dict[str, Any] = {"scheduler": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}

CASES = [
    case("KolorsPipeline", text, **EULER),
    case("KolorsImg2ImgPipeline", img2img, "image", encoder=encoder, **DPM),
    case("KolorsPAGPipeline", text, **DPM),
]
