"""Lumina's pipelines: flows whose networks count time from noise to data."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from . import Case, autoencoder_kl, noise, pipeline


def vae(**config: Any) -> Any:
    """Return an autoencoder that divides each side by eight, which the pipelines assume."""
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8,) * 4,
    }
    return autoencoder_kl(**(blocks | config))


def lumina(name: str, transformer: Any, scheduler: Any, **config: Any) -> Any:
    components = {"transformer": transformer, "vae": vae(**config), "scheduler": scheduler}
    return pipeline(name, tokenizer=None, text_encoder=None, **components)


def first() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=16, num_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, cross_attention_dim=16,
    )  # fmt: skip
    return lumina("LuminaPipeline", transformer, diffusers.FlowMatchEulerDiscreteScheduler())


def second() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(128, 32, 32),
        cap_feat_dim=16,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    return lumina("Lumina2Pipeline", transformer, scheduler, shift_factor=0.1)


def call() -> dict[str, Any]:
    mask = torch.ones(1, 5, dtype=torch.long)
    return {
        "height": 32,
        "width": 48,
        "prompt_embeds": noise(1, 5, 16),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": noise(1, 5, 16, seed=1),
        "negative_prompt_attention_mask": mask,
    }


CASES = [
    Case("LuminaPipeline", first, call),
    Case("Lumina2Pipeline", second, call),
]
