"""DDPM and DDIM: diffusion of pixels without any condition."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from zoo import Case, pipeline


def unet(sample_size: Any, **config: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=sample_size, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, **config,
    )  # fmt: skip


def ddpm() -> Any:
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large", clip_sample=True)
    return pipeline("DDPMPipeline", unet=unet((16, 24)), scheduler=scheduler)


def ddim() -> Any:
    return pipeline("DDIMPipeline", unet=unet((16, 24)), scheduler=diffusers.DDIMScheduler(clip_sample=True))


CASES = [
    Case("DDPMPipeline", ddpm, dict, ("unet",), "unconditional"),
    Case("DDIMPipeline", ddim, dict, ("unet",), "unconditional"),
]
