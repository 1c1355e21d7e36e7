"""Flux.1: text, image, inpainting, control, fill and Kontext pipelines, with its CLIP and T5 encoders left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch

from . import Case, autoencoder_kl, image, mask, noise, pipeline

DEV = {"shift": 3.0, "use_dynamic_shifting": True}
SCHNELL = {"shift": 1.0, "use_dynamic_shifting": False}
SIZE = {"height": 16, "width": 24}


def build(name: str, scheduler: dict[str, Any] = DEV, in_channels: int = 16, controlnet: bool = False) -> Any:
    torch.manual_seed(0)
    config = {
        "patch_size": 1, "in_channels": in_channels, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": scheduler is DEV,
    }  # fmt: skip
    components: dict[str, Any] = {
        "transformer": diffusers.FluxTransformer2DModel(**config, out_channels=16),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
        "vae": autoencoder_kl(shift_factor=0.1),
        "text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None,
    }  # fmt: skip
    if controlnet:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about what diffusers itself uses there
            components["controlnet"] = diffusers.FluxControlNetModel(**config)
        for name_, weight in components["controlnet"].named_parameters():
            if name_.startswith(("controlnet_blocks", "controlnet_single_blocks", "controlnet_x_embedder")):
                torch.nn.init.normal_(weight, std=0.1)  # zero at first, so that the control would do nothing
    return pipeline(name, **components)


def text(true_cfg_scale: float | None = None) -> dict[str, Any]:
    call: dict[str, Any] = {"prompt_embeds": noise(1, 8, 16), "pooled_prompt_embeds": noise(1, 16, seed=1)}
    if true_cfg_scale is not None:
        call |= {
            "true_cfg_scale": true_cfg_scale,
            "negative_prompt_embeds": noise(1, 8, 16, seed=2),
            "negative_pooled_prompt_embeds": noise(1, 16, seed=3),
        }
    return call | SIZE


def img2img() -> dict[str, Any]:
    return text() | {"image": image(16, 24), "strength": 0.6}


def inpaint() -> dict[str, Any]:
    return img2img() | {"mask_image": mask(16, 24)}


def controlled(call: Callable[[], dict[str, Any]] = text) -> dict[str, Any]:
    return call() | {"control_image": image(16, 24, seed=1)}


def fill() -> dict[str, Any]:
    return text() | {"image": image(16, 24), "mask_image": mask(16, 24)}


def kontext() -> dict[str, Any]:
    # It would otherwise scale both images to a million pixels.
    return text(2.0) | {"image": image(16, 16), "max_area": 16 * 24, "_auto_resize": False}


def kontext_inpaint() -> dict[str, Any]:
    return inpaint() | {"image_reference": image(16, 24, seed=1), "max_area": 16 * 24, "_auto_resize": False}


def case(name: str, call: Callable[[], dict[str, Any]], task: Any = "text", **config: Any) -> Case:
    networks = ("transformer", "controlnet") if "controlnet" in config else ("transformer",)
    return Case(name, partial(build, name, **config), call, networks, task)


CASES = [
    case("FluxPipeline", text),
    case("FluxImg2ImgPipeline", img2img, "image", scheduler=SCHNELL),
    case("FluxInpaintPipeline", lambda: inpaint() | text(2.0), "inpaint"),
    case("FluxControlPipeline", controlled, "control", in_channels=32),
    case("FluxControlImg2ImgPipeline", lambda: controlled(img2img), "image", in_channels=32),
    case("FluxControlInpaintPipeline", lambda: controlled(inpaint), "inpaint", in_channels=32),
    case("FluxControlNetPipeline", controlled, "control", controlnet=True),
    case("FluxControlNetImg2ImgPipeline", lambda: controlled(img2img), "image", controlnet=True, scheduler=SCHNELL),
    case("FluxControlNetInpaintPipeline", lambda: controlled(inpaint), "inpaint", controlnet=True),
    case("FluxFillPipeline", fill, "inpaint", in_channels=48),
    case("FluxKontextPipeline", kontext, "edit"),
    case("FluxKontextInpaintPipeline", kontext_inpaint, "inpaint"),
]
