"""Pipelines of single transformers: HiDream, DiT, Latte, OmniGen."""

from __future__ import annotations

import string
import sys
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from transformers import LlamaTokenizer

from . import Case, autoencoder_kl, image, noise, pipeline
from .text import pictures

LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}


def hidream() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_channels=[16, 16], text_emb_dim=16, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(16, 16), llama_layers=(0, 1),
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    texts = {f"{kind}{suffix}": None for kind in ("text_encoder", "tokenizer") for suffix in ("", "_2", "_3", "_4")}
    components = {"transformer": transformer, "vae": autoencoder_kl(shift_factor=0.1), "scheduler": scheduler}
    pipe = pipeline("HiDreamImagePipeline", **components, **texts)
    pipe.default_sample_size = 8  # every image is rescaled to the area this gives
    return pipe


def hidream_call() -> dict[str, Any]:
    kwargs: dict[str, Any] = {"height": 16, "width": 24}
    for seed, sign in enumerate(("", "negative_")):
        kwargs[f"{sign}prompt_embeds_t5"] = noise(1, 4, 16, seed=seed)
        kwargs[f"{sign}prompt_embeds_llama3"] = noise(2, 1, 4, 16, seed=seed + 2)
        kwargs[f"{sign}pooled_prompt_embeds"] = noise(1, 16, seed=seed + 4)
    return kwargs


def dit() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(**LINEAR)
    return pipeline("DiTPipeline", transformer=transformer, vae=autoencoder_kl(), scheduler=scheduler)


def latte() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=16,
        in_channels=4, cross_attention_dim=16, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=3,
    )  # fmt: skip
    components = {"transformer": transformer, "vae": autoencoder_kl(), "scheduler": diffusers.DDIMScheduler(**LINEAR)}
    return pipeline("LattePipeline", tokenizer=None, text_encoder=None, **components)


def latte_call() -> dict[str, Any]:
    return {
        "height": 16,
        "width": 24,
        "video_length": 3,
        "prompt_embeds": noise(1, 5, 16),
        "negative_prompt": None,
        "negative_prompt_embeds": noise(1, 5, 16, seed=1),
    }


class Normalize:
    def __init__(self, mean: list[float], std: list[float], inplace: bool) -> None:
        self.mean, self.std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (mean, std))

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels - self.mean) / self.std


class Compose:
    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def __call__(self, picture: Any) -> Any:
        for part in self.parts:
            picture = part(picture)
        return picture


def to_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.tensor(np.asarray(picture)).movedim(-1, 0) / 255


TRANSFORMS = SimpleNamespace(Compose=Compose, Lambda=lambda f: f, ToTensor=lambda: to_tensor, Normalize=Normalize)
"""What OmniGen reads of torchvision, which is not installed where this is tested."""


def omnigen() -> Any:
    from diffusers.pipelines.omnigen import processor_omnigen

    pipeline_omnigen: Any = sys.modules[diffusers.OmniGenPipeline.__module__]
    if not hasattr(processor_omnigen, "transforms"):
        vars(processor_omnigen)["transforms"] = TRANSFORMS
        pipeline_omnigen.OmniGenMultiModalProcessor = processor_omnigen.OmniGenMultiModalProcessor
    torch.manual_seed(0)
    pieces = ["<unk>", "<s>", "</s>", *string.printable]
    tokenizer = LlamaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    transformer = diffusers.OmniGenTransformer2DModel(
        in_channels=4, patch_size=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, num_layers=1, pad_token_id=0, vocab_size=len(pieces), time_step_dim=16,
        rope_scaling={"short_factor": [1.0] * 4, "long_factor": [1.0] * 4, "type": "su"}, pos_embed_max_size=8,
    )  # fmt: skip
    vae = autoencoder_kl(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1)
    return pipeline("OmniGenPipeline", transformer=transformer, vae=vae, scheduler=scheduler, tokenizer=tokenizer)


def omnigen_call() -> dict[str, Any]:
    shown = [pictures("image", image(16, 32))]
    return {"prompt": "a cat <img><|image_1|></img>", "input_images": shown, "height": 32, "width": 48}


CASES = [
    Case("HiDreamImagePipeline", hidream, hidream_call),
    Case("DiTPipeline", dit, lambda: {"class_labels": [7], "guidance_scale": 4.0}, task="class"),
    Case("LattePipeline", latte, latte_call, task="video"),
    Case("OmniGenPipeline", omnigen, lambda: {"prompt": "a cat", "height": 32, "width": 48}),
    Case("OmniGenPipeline", omnigen, omnigen_call, task="edit", variant="from an image"),
]
