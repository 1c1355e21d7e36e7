"""Flux.2 and its Klein variants, with the Mistral or Qwen encoder left out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from PIL import Image

from . import Case, image, mask, noise, pipeline

SIZE = {"height": 16, "width": 24}


def autoencoder() -> Any:
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    vae.bn.running_mean.uniform_(-0.5, 0.5)  # it scales the latents, channel by channel
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def build(name: str, guidance_embeds: bool = False, **config: Any) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    encoder = {"text_encoder": None, "tokenizer": None}
    return pipeline(name, transformer=transformer, scheduler=scheduler, vae=autoencoder(), **encoder, **config)


def text() -> dict[str, Any]:
    return {"prompt_embeds": noise(1, 8, 16)} | SIZE


def guided() -> dict[str, Any]:
    return text() | {"negative_prompt_embeds": noise(1, 8, 16, seed=1), "guidance_scale": 2.0}


def inpaint() -> dict[str, Any]:
    return guided() | {"image": image(16, 24), "mask_image": mask(16, 24), "strength": 0.6}


def edit() -> dict[str, Any]:
    colours = (255 * image(64, 64)[0].permute(1, 2, 0)).byte().numpy()  # the smallest that it takes
    return text() | {"image": Image.fromarray(colours)}


def case(name: str, call: Callable[[], dict[str, Any]], task: Any = "text", **config: Any) -> Case:
    return Case(name, partial(build, name, **config), call, task=task)


CASES = [
    case("Flux2Pipeline", text, guidance_embeds=True),
    case("Flux2KleinPipeline", guided, is_distilled=False),
    case("Flux2KleinInpaintPipeline", inpaint, "inpaint", is_distilled=False),
    case("Flux2KleinKVPipeline", edit, "edit"),
]
