"""Marigold: depth, normals and intrinsic images of a photograph."""

from __future__ import annotations

from typing import Any

import torch

from tiny import clip_text
from zoo import Case, autoencoder_kl, image, pipeline
from zoo.stable_diffusion import scheduler, unet


def build(name: str, parts: int = 1, **config: Any) -> Any:
    """Return a pipeline whose latents are those of a number of images."""
    torch.manual_seed(2)
    text_encoder, tokenizer = clip_text()
    return pipeline(
        name,
        unet=unet(in_channels=4 * (parts + 1), out_channels=4 * parts),
        vae=autoencoder_kl(),
        scheduler=scheduler(
            "DDIM", prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        default_denoising_steps=4,
        default_processing_resolution=0,
        **config,
    )


def intrinsics() -> Any:
    properties = {
        "target_names": ["albedo", "shading", "residual"],
        "albedo": {"prediction_space": "linear"},
        "shading": {"prediction_space": "linear"},
        "residual": {"prediction_space": "linear"},
    }
    return build("MarigoldIntrinsicsPipeline", 3, prediction_type="intrinsics", target_properties=properties)


def call() -> dict[str, Any]:
    return {"image": image(16, 24)}


CASES = [
    Case(
        "MarigoldDepthPipeline",
        lambda: build("MarigoldDepthPipeline", prediction_type="depth"),
        call,
        ("unet",),
        "edit",
    ),
    Case(
        "MarigoldNormalsPipeline",
        lambda: build("MarigoldNormalsPipeline", prediction_type="normals"),
        call,
        ("unet",),
        "edit",
    ),
    Case("MarigoldIntrinsicsPipeline", intrinsics, call, ("unet",), "edit"),
]
