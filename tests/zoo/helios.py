"""Helios: frames in chunks, the scheduler set anew for each of them, and in the pyramid for each resolution."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from . import Case, pipeline
from .wan import TEXT, autoencoder, embeds, picture


def build(name: str, scheduler: Any, vae: dict[str, Any] | None = None, **config: Any) -> Any:
    torch.manual_seed(0)
    network = diffusers.HeliosTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=TEXT, freq_dim=16, ffn_dim=24, num_layers=1, rope_dim=(4, 4, 4),
    )  # fmt: skip
    components = {"tokenizer": None, "text_encoder": None, "vae": autoencoder(**(vae or {})), "transformer": network}
    return pipeline(name, scheduler=scheduler, **components, **config)


def chunks() -> Any:
    scheduler = diffusers.HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True)
    return build("HeliosPipeline", scheduler)


# at its default of 1/3 the covariance of the noise between stages is singular: whether its Cholesky factor exists then
# depends on the processor
GAMMA = 0.3
# the pyramid halves the latents twice, so they must not be too small
HALVING = {"dim_mult": [1, 1], "temperal_downsample": [True], "scale_factor_temporal": 2, "scale_factor_spatial": 2}


def pyramid() -> Any:
    return build("HeliosPyramidPipeline", diffusers.HeliosScheduler(gamma=GAMMA), HALVING, is_cfg_zero_star=True)


def distilled_pyramid() -> Any:
    return build("HeliosPyramidPipeline", diffusers.HeliosDMDScheduler(gamma=GAMMA), HALVING, is_distilled=True)


def call(**more: Any) -> dict[str, Any]:
    # two chunks, so that the loop runs twice
    return {"height": 16, "width": 32, "num_frames": 9, "num_latent_frames_per_chunk": 2, **embeds(), **more}


def image_call() -> dict[str, Any]:
    return call(image=picture())


def pyramid_call(**more: Any) -> dict[str, Any]:
    size = {"height": 32, "width": 48, "num_frames": 3, "num_latent_frames_per_chunk": 2}
    steps = {"num_inference_steps": "DROP", "pyramid_num_inference_steps_list": [2, 2, 2]}
    return size | steps | embeds() | more


def distilled_call() -> dict[str, Any]:
    return pyramid_call(guidance_scale=1.0)


CASES = [
    Case("HeliosPipeline", chunks, call),
    Case("HeliosPipeline", chunks, image_call, task="video", variant="from an image"),
    Case("HeliosPyramidPipeline", pyramid, pyramid_call),
    Case("HeliosPyramidPipeline", distilled_pyramid, distilled_call, variant="distilled"),
]
