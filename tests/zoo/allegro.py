"""Allegro's pipeline."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from . import Case, noise, pipeline


def build() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=24, sample_width=8, sample_height=8, sample_frames=8, caption_channels=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4
    )
    vae.enable_tiling()  # decoding works only by tiles, and a video smaller than one would be lost
    vae.kernel = vae.stride = (8, 16, 32)
    vae.enable_slicing()  # the tiled decoder takes one video at a time
    scheduler = diffusers.EulerAncestralDiscreteScheduler(beta_start=0.0001, beta_end=0.02)
    components = {"transformer": transformer, "vae": vae, "scheduler": scheduler}
    return pipeline("AllegroPipeline", tokenizer=None, text_encoder=None, **components)


def call() -> dict[str, Any]:
    mask = torch.ones(1, 5, dtype=torch.long)
    return {
        "height": 16,
        "width": 32,
        "num_frames": 8,
        "prompt_embeds": noise(1, 5, 16),
        "prompt_attention_mask": mask,
        "negative_prompt": None,
        "negative_prompt_embeds": noise(1, 5, 16, seed=1),
        "negative_prompt_attention_mask": mask,
    }


CASES = [Case("AllegroPipeline", build, call, task="video")]
