"""HunyuanImage 2.1 and its refiner."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from . import Case, image, noise, pipeline

TRANSFORMER = {
    "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_single_layers": 1,
    "num_refiner_layers": 1, "text_embed_dim": 16,
}  # fmt: skip


def parts(**transformer: Any) -> dict[str, Any]:
    model = diffusers.HunyuanImageTransformer2DModel(**TRANSFORMER, **transformer)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    return {"transformer": model, "scheduler": scheduler, "text_encoder": None, "tokenizer": None}


def base() -> Any:
    torch.manual_seed(0)
    guider = diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2)
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        spatial_compression_ratio=2, sample_size=16, scaling_factor=0.75,
    )  # fmt: skip
    return pipeline(
        "HunyuanImagePipeline", vae=vae, text_encoder_2=None, tokenizer_2=None, guider=guider, ocr_guider=None,
        **parts(in_channels=4, out_channels=4, text_embed_2_dim=16, rope_axes_dim=(4, 4)),
    )  # fmt: skip


def refiner() -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=4, block_out_channels=(32, 32), layers_per_block=1, spatial_compression_ratio=2,
        temporal_compression_ratio=1,
    )  # fmt: skip
    # Two frames of four channels are one of eight; as many belong to the image that is refined.
    dims = {"in_channels": 16, "out_channels": 8, "patch_size": (1, 1, 1), "rope_axes_dim": (4, 2, 2)}
    return pipeline("HunyuanImageRefinerPipeline", vae=vae, **parts(guidance_embeds=True, **dims))


def text(prefix: str = "", suffix: str = "", seed: int = 0) -> dict[str, Any]:
    embeds = {f"{prefix}prompt_embeds{suffix}": noise(1, 5, 16, seed=seed)}
    return embeds | {f"{prefix}prompt_embeds_mask{suffix}": torch.ones(1, 5).long()}


def call(**more: Any) -> dict[str, Any]:
    return text() | text("negative_", seed=1) | {"height": 16, "width": 24} | more


CASES = [
    Case("HunyuanImagePipeline", base, lambda: call(**text("", "_2", 2), **text("negative_", "_2", 3))),
    Case("HunyuanImageRefinerPipeline", refiner, lambda: call(image=image(16, 24)), task="edit"),
]
