"""EasyAnimate: text to video and inpainting of videos; its control pipeline fails on its own in diffusers 0.42."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from zoo import Case, image, mask, noise, pipeline


def build(name: str, in_channels: int = 4, **scheduler: Any) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=in_channels, out_channels=4, time_embed_dim=4,
        text_embed_dim=16, num_layers=1, mmdit_layers=1, sample_width=4, sample_height=4, patch_size=2,
        resize_inpaint_mask_directly=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLMagvit(
        down_block_types=("SpatialDownBlock3D", "SpatialTemporalDownBlock3D", "SpatialTemporalDownBlock3D"),
        up_block_types=("SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D"),
        block_out_channels=(8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        spatial_group_norm=False,
    )  # fmt: skip
    return pipeline(
        name, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler), vae=vae, text_encoder=None,
        tokenizer=None, transformer=transformer,
    )  # fmt: skip


def call(**more: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 5, 16), "negative_prompt_embeds": noise(1, 5, 16, seed=1),
        "prompt_attention_mask": torch.ones(1, 5), "negative_prompt_attention_mask": torch.ones(1, 5),
        "height": 16, "width": 32, "num_frames": 5, **more,
    }  # fmt: skip


def inpaint() -> dict[str, Any]:
    torch.manual_seed(0)  # the pipeline encodes the video with numbers of the global generator
    video = torch.stack([image(16, 32, seed=i) for i in range(5)], dim=2)
    painted = mask(16, 32).unsqueeze(2).repeat(1, 1, 5, 1, 1)
    return call(video=video, mask_video=painted, strength=0.7)


CASES = [
    Case("EasyAnimatePipeline", lambda: build("EasyAnimatePipeline", use_dynamic_shifting=True), call),
    Case(
        "EasyAnimateInpaintPipeline",
        lambda: build("EasyAnimateInpaintPipeline", in_channels=12, shift=3.0),
        inpaint,
        task="inpaint",
    ),
]
