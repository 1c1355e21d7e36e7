"""PixArt's pipelines: a transformer that also predicts variances, which the pipelines cut off."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from . import Case, autoencoder_kl, noise, pipeline

BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def pixart(name: str, scheduler: Any, **extra: Any) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=16,
        in_channels=4, cross_attention_dim=16, out_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    components = {"transformer": transformer, "vae": autoencoder_kl(), "scheduler": scheduler}
    return pipeline(name, tokenizer=None, text_encoder=None, **components, **extra)


def alpha() -> Any:
    return pixart("PixArtAlphaPipeline", diffusers.DPMSolverMultistepScheduler(**BETAS))


def sigma() -> Any:
    return pixart("PixArtSigmaPipeline", diffusers.DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True))


def perturbed() -> Any:
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS)
    return pixart("PixArtSigmaPAGPipeline", scheduler, pag_applied_layers=["blocks.1"])


def call() -> dict[str, Any]:
    mask = torch.ones(1, 5)
    return {
        "height": 16,
        "width": 24,
        "use_resolution_binning": False,
        "prompt_embeds": noise(1, 5, 16),
        "prompt_attention_mask": mask,
        "negative_prompt": None,
        "negative_prompt_embeds": noise(1, 5, 16, seed=1),
        "negative_prompt_attention_mask": mask,
    }


CASES = [
    Case("PixArtAlphaPipeline", alpha, call),
    Case("PixArtSigmaPipeline", sigma, call),
    Case("PixArtSigmaPAGPipeline", perturbed, call),
]
