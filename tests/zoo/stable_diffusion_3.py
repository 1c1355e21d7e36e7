"""Stable Diffusion 3: text, image, inpainting, ControlNet and PAG pipelines, with its three encoders left out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch

from . import Case, autoencoder_kl, image, mask, noise, pipeline

SIZE = {"height": 16, "width": 24}
STATIC = {"shift": 3.0}
MASKED = {"extra_conditioning_channels": 1}
DYNAMIC = {"use_dynamic_shifting": True}
BLOCKS: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 16, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16,
    "out_channels": 16, "pos_embed_max_size": 16,
}  # fmt: skip


def build(
    name: str, scheduler: dict[str, Any] = STATIC, controlnet: dict[str, Any] | None = None, **config: Any
) -> Any:
    torch.manual_seed(0)
    components: dict[str, Any] = {
        "transformer": diffusers.SD3Transformer2DModel(**(BLOCKS | config)),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
        "vae": autoencoder_kl(16, scaling_factor=1.5, shift_factor=0.06),
        "text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None,
        "text_encoder_3": None, "tokenizer_3": None,
    }  # fmt: skip
    if controlnet is not None:
        components["controlnet"] = diffusers.SD3ControlNetModel(**(BLOCKS | {"num_layers": 1} | controlnet))
        for weight in components["controlnet"].parameters():
            if not weight.any():
                torch.nn.init.normal_(weight, std=0.1)  # zero at first, so that the control would do nothing
    return pipeline(name, **components)


def text() -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 8, 16),
        "pooled_prompt_embeds": noise(1, 16, seed=1),
        "negative_prompt_embeds": noise(1, 8, 16, seed=2),
        "negative_pooled_prompt_embeds": noise(1, 16, seed=3),
    } | SIZE


def img2img() -> dict[str, Any]:
    return text() | {"image": image(16, 24), "strength": 0.6}


def inpaint() -> dict[str, Any]:
    return img2img() | {"mask_image": mask(16, 24)}


def control() -> dict[str, Any]:
    torch.manual_seed(0)  # the control image's latents are drawn without the generator
    return text() | {"control_image": image(16, 24, seed=1)}


def control_inpaint() -> dict[str, Any]:
    return control() | {"control_mask": mask(16, 24)}


def case(name: str, call: Callable[[], dict[str, Any]], task: Any = "text", **config: Any) -> Case:
    networks = ("transformer", "controlnet") if "controlnet" in config else ("transformer",)
    return Case(name, partial(build, name, **config), call, networks, task)


CASES = [
    case("StableDiffusion3Pipeline", text, qk_norm="rms_norm", dual_attention_layers=(0,)),
    case("StableDiffusion3Img2ImgPipeline", img2img, "image"),
    case("StableDiffusion3InpaintPipeline", inpaint, "inpaint", scheduler=DYNAMIC),
    case("StableDiffusion3ControlNetPipeline", control, "control", controlnet={}),
    case("StableDiffusion3ControlNetInpaintingPipeline", control_inpaint, "control", controlnet=MASKED),
    case("StableDiffusion3PAGPipeline", text),
    case("StableDiffusion3PAGImg2ImgPipeline", img2img, "image"),
]
