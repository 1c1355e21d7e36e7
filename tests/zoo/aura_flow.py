"""AuraFlow, with its T5 encoder left out."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from . import Case, autoencoder_kl, noise, pipeline


def build() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16,
        pos_embed_max_size=64,
    )  # fmt: skip
    return pipeline(
        "AuraFlowPipeline", transformer=transformer, vae=autoencoder_kl(), text_encoder=None, tokenizer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
    )  # fmt: skip


def text() -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 8, 16),
        "prompt_attention_mask": torch.ones(1, 8),
        "negative_prompt_embeds": noise(1, 8, 16, seed=1),
        "negative_prompt_attention_mask": torch.ones(1, 8),
        "height": 16,
        "width": 24,
    }


CASES = [Case("AuraFlowPipeline", build, text)]
