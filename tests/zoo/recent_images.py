"""Image pipelines of 2026 that are alone in their families."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from . import Case, noise, pipeline
from .qwen import awake, picture, vae
from .text import Processor, byte_tokenizer, seeing

SIZE = {"height": 16, "width": 24}


def scheduler(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def flux2_vae() -> Any:
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4, sample_size=16,
    )  # fmt: skip
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def text_encoder(layers: int = 1) -> Any:
    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision))


def ernie() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=16, num_attention_heads=2, num_layers=1, ffn_hidden_size=16, in_channels=16, out_channels=16,
        text_in_dim=16, rope_axes_dim=(4, 2, 2),
    )  # fmt: skip
    return pipeline(
        "ErnieImagePipeline", transformer=awake(transformer), vae=flux2_vae(), text_encoder=None, tokenizer=None,
        scheduler=scheduler(shift=4.0),
    )  # fmt: skip


def ideogram() -> Any:
    torch.manual_seed(0)
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    tokenizer = Qwen2Tokenizer(vocab=letters | {"<|endoftext|>": 26}, merges=[])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}"
    # Outputs of thirteen of thirty-six layers are the features of a token.
    config = {
        "in_channels": 16, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "intermediate_size": 16,
        "adaln_dim": 16, "llm_features_dim": 13 * 16, "mrope_section": (2, 1, 1),
    }  # fmt: skip
    transformer, unconditional = (diffusers.Ideogram4Transformer2DModel(**config) for _ in range(2))
    return pipeline(
        "Ideogram4Pipeline", scheduler=scheduler(), vae=flux2_vae(), text_encoder=text_encoder(36).model,
        tokenizer=tokenizer, transformer=transformer, unconditional_transformer=unconditional,
    )  # fmt: skip


def nucleus() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4), mlp_ratio=2.0, dense_moe_strategy="all_moe", num_experts=2,
        moe_intermediate_dim=16, capacity_factors=1.0,
    )  # fmt: skip
    for parameter in transformer.parameters():
        if parameter.ndim == 3:  # Experts are left as they lie in memory.
            torch.nn.init.normal_(parameter, std=0.2)
    return pipeline(
        "NucleusMoEImagePipeline", transformer=transformer, scheduler=scheduler(use_dynamic_shifting=True), vae=vae(),
        text_encoder=None, processor=Processor(),
    )  # fmt: skip


def joy(name: str, transformer: str, images: str) -> Any:
    torch.manual_seed(0)
    model = getattr(diffusers, transformer)(
        in_channels=4, hidden_size=16, num_attention_heads=2, text_dim=16, mlp_width_ratio=2.0, num_layers=1,
        rope_dim_list=[4, 2, 2],
    )  # fmt: skip
    wan = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=0, temperal_downsample=[False, False],
        latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.2, 0.8, 1.0, 1.1], scale_factor_spatial=4,
    )  # fmt: skip
    pipe = pipeline(
        name, scheduler=scheduler(shift=4.0), vae=wan, tokenizer=byte_tokenizer(), transformer=awake(model),
        text_encoder=seeing("Qwen3VLForConditionalGeneration", 16, len(byte_tokenizer()), 1),
        processor=Processor(patch_size=4),
    )  # fmt: skip
    # Else images are of a million pixels, whatever is asked for.
    getattr(pipe, images).get_default_height_width = lambda *_: (16, 24)
    return pipe


def embeds() -> dict[str, Any]:
    masks = {"prompt_embeds_mask": torch.ones(1, 5).long(), "negative_prompt_embeds_mask": torch.ones(1, 5).long()}
    return {"prompt_embeds": noise(1, 5, 16), "negative_prompt_embeds": noise(1, 5, 16, seed=1)} | masks


def call_ernie() -> dict[str, Any]:
    return {"prompt_embeds": [noise(5, 16)], "negative_prompt_embeds": [noise(3, 16, seed=1)]} | SIZE


def call_joy() -> dict[str, Any]:
    torch.manual_seed(0)  # The latents of the image are drawn without the generator.
    return embeds() | {"image": picture(16, 24)}


def call_ideogram() -> dict[str, Any]:
    guidance = {"guidance_scale": 3.0, "guidance_schedule": None}
    return {"prompt": "hello", "max_sequence_length": 8} | guidance | SIZE


CASES = [
    Case("ErnieImagePipeline", ernie, call_ernie),
    Case("Ideogram4Pipeline", ideogram, call_ideogram, networks=("transformer", "unconditional_transformer")),
    Case("NucleusMoEImagePipeline", nucleus, lambda: embeds() | SIZE),
    Case(
        "JoyImageEditPipeline",
        partial(joy, "JoyImageEditPipeline", "JoyImageEditTransformer3DModel", "vae_image_processor"),
        call_joy,
        task="edit",
    ),
    Case(
        "JoyImageEditPlusPipeline",
        partial(joy, "JoyImageEditPlusPipeline", "JoyImageEditPlusTransformer3DModel", "image_processor"),
        lambda: {"prompt": "hello", "images": [picture(16, 24)]} | SIZE,
        task="edit",
    ),
]
