"""Stable Diffusion XL: text, image, refiner, inpainting, editing, PAG and adapter pipelines, without encoders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch

from . import Case, autoencoder_kl, image, mask, noise, pipeline

SIZE = {"height": 16, "width": 24}
BLOCKS: dict[str, Any] = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 16, "attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 1),
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16, "norm_num_groups": 4,
}  # fmt: skip
BETAS = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading",
    "steps_offset": 1,
}  # fmt: skip
KARRAS = {"use_karras_sigmas": True}
ANCESTRAL = "EulerAncestralDiscreteScheduler"
DDIM = {"clip_sample": False, "set_alpha_to_one": False}


def unet(in_channels: int = 4, **config: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        in_channels=in_channels, out_channels=4, sample_size=8, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **(BLOCKS | config),
    )  # fmt: skip


def build(
    name: str,
    scheduler: str = "EulerDiscreteScheduler",
    betas: dict[str, Any] | None = None,
    extra: Callable[[], dict[str, Any]] = dict,
    **config: Any,
) -> Any:
    torch.manual_seed(0)
    return pipeline(
        name, unet=unet(**config), scheduler=getattr(diffusers, scheduler)(**(BETAS | (betas or {}))),
        vae=autoencoder_kl(), text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, **extra(),
    )  # fmt: skip


def text() -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 8, 16),
        "pooled_prompt_embeds": noise(1, 16, seed=1),
        "negative_prompt_embeds": noise(1, 8, 16, seed=2),
        "negative_pooled_prompt_embeds": noise(1, 16, seed=3),
    }


def text_to_image() -> dict[str, Any]:
    return text() | SIZE


def img2img() -> dict[str, Any]:
    return text() | {"image": image(16, 24), "strength": 0.7}


def refiner() -> dict[str, Any]:
    # Latents that the base model has left noisy, where "strength" is of no account.
    return text() | {"image": noise(1, 4, 8, 12, seed=4), "denoising_start": 0.5}


def inpaint() -> dict[str, Any]:
    return img2img() | SIZE | {"mask_image": mask(16, 24)}


def with_image() -> dict[str, Any]:
    return text_to_image() | {"image": image(16, 24)}


def adapter() -> dict[str, Any]:
    config = {"channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 4, "adapter_type": "full_adapter_xl"}
    return {"adapter": diffusers.T2IAdapter(**config)}


def case(name: str, call: Callable[[], dict[str, Any]], task: Any = "text", variant: str = "", **config: Any) -> Case:
    return Case(name, partial(build, name, **config), call, ("unet",), task, variant)


REFINER = {"extra": lambda: {"requires_aesthetics_score": True}, "projection_class_embeddings_input_dim": 5 * 8 + 16}

CASES = [
    case("StableDiffusionXLPipeline", text_to_image),
    case("StableDiffusionXLImg2ImgPipeline", img2img, "image", scheduler="DPMSolverMultistepScheduler", betas=KARRAS),
    case("StableDiffusionXLImg2ImgPipeline", refiner, "image", "refiner", **REFINER),
    case("StableDiffusionXLInpaintPipeline", inpaint, "inpaint"),
    case("StableDiffusionXLInstructPix2PixPipeline", with_image, "edit", in_channels=8),
    case("StableDiffusionXLPAGPipeline", text_to_image, scheduler="UniPCMultistepScheduler"),
    case("StableDiffusionXLPAGImg2ImgPipeline", img2img, "image", scheduler="DDIMScheduler", betas=DDIM),
    case("StableDiffusionXLPAGInpaintPipeline", inpaint, "inpaint", in_channels=9),
    case("StableDiffusionXLAdapterPipeline", with_image, "control", extra=adapter, scheduler=ANCESTRAL),
]
