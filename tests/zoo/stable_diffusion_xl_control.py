"""Stable Diffusion XL with ControlNet and ControlNet Union, with its text encoders left out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch

from . import Case, image
from .stable_diffusion_xl import BLOCKS, KARRAS, build, img2img, inpaint, text_to_image


def controlnet(union: bool = False) -> dict[str, Any]:
    hint = {"conditioning_embedding_out_channels": (8, 8)}
    if union:
        tasks = {"num_trans_channel": 8, "num_trans_head": 2, "num_proj_channel": 8}
        network = diffusers.ControlNetUnionModel(**BLOCKS, **hint, **tasks)
    else:
        network = diffusers.ControlNetModel(**BLOCKS, **hint)
    for weight in network.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.1)  # zero at first, so that the control would do nothing
    return {"controlnet": network}


def text() -> dict[str, Any]:
    return text_to_image() | {"image": image(16, 24, seed=1)}


def controlled(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return call() | {"control_image": image(16, 24, seed=1)}


def united(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    images = [image(16, 24, seed=1), image(16, 24, seed=2)]
    return call() | {"control_image": images, "control_mode": [0, 3]}


def case(name: str, call: Callable[[], dict[str, Any]], task: Any, extra: Any = controlnet, **config: Any) -> Case:
    return Case(name, partial(build, name, extra=extra, **config), call, ("unet", "controlnet"), task)


DPM: dict[str, Any] = {"scheduler": "DPMSolverMultistepScheduler", "betas": KARRAS}
UNION: dict[str, Any] = {"extra": partial(controlnet, union=True)}

CASES = [
    case("StableDiffusionXLControlNetPipeline", text, "control"),
    case("StableDiffusionXLControlNetImg2ImgPipeline", lambda: controlled(img2img), "image", **DPM),
    case("StableDiffusionXLControlNetInpaintPipeline", lambda: controlled(inpaint), "inpaint"),
    case("StableDiffusionXLControlNetUnionPipeline", lambda: united(text_to_image), "control", **UNION),
    case("StableDiffusionXLControlNetUnionImg2ImgPipeline", lambda: united(img2img), "image", **UNION),
    case("StableDiffusionXLControlNetUnionInpaintPipeline", lambda: united(inpaint), "inpaint", **UNION, **DPM),
    case("StableDiffusionXLControlNetPAGPipeline", text, "control", **DPM),
    case("StableDiffusionXLControlNetPAGImg2ImgPipeline", lambda: controlled(img2img), "image"),
]
