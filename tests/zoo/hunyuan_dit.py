"""Hunyuan-DiT's pipelines: two text embeddings, velocity prediction with variances that the pipelines cut off."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from . import Case, autoencoder_kl, image, noise, pipeline
from .qwen import awake

DIT = {
    "sample_size": 4,
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "in_channels": 4,
    "hidden_size": 16,
    "cross_attention_dim": 16,
    "cross_attention_dim_t5": 16,
    "pooled_projection_dim": 16,
    "text_len": 77,
    "text_len_t5": 256,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.018,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "steps_offset": 1,
}


def vae() -> Any:
    """Return an autoencoder that divides each side by eight, which the rotary embeddings assume."""
    return autoencoder_kl(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
    )


def hunyuan(name: str, scheduler: Any, **extra: Any) -> Any:
    torch.manual_seed(0)
    return pipeline(
        name, transformer=diffusers.HunyuanDiT2DModel(num_layers=4, **DIT), vae=vae(), scheduler=scheduler,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **extra,
    )  # fmt: skip


def ddpm() -> Any:
    return diffusers.DDPMScheduler(clip_sample=False, timestep_spacing="leading", **SCHEDULER)


def text_to_image() -> Any:
    return hunyuan("HunyuanDiTPipeline", ddpm())


def perturbed() -> Any:
    scheduler = diffusers.DPMSolverMultistepScheduler(**SCHEDULER)
    return hunyuan("HunyuanDiTPAGPipeline", scheduler, pag_applied_layers=["blocks.1"])


def control() -> Any:
    torch.manual_seed(2)
    controlnet = awake(diffusers.HunyuanDiT2DControlNetModel(transformer_num_layers=4, **DIT))
    return hunyuan("HunyuanDiTControlNetPipeline", ddpm(), controlnet=controlnet)


def call() -> dict[str, Any]:
    kwargs: dict[str, Any] = {"height": 32, "width": 48, "use_resolution_binning": False}
    for suffix, length, seed in ("", 77, 0), ("_2", 256, 1):
        for sign in "", "negative_":
            kwargs[f"{sign}prompt_embeds{suffix}"] = noise(1, length, 16, seed=seed + 2 * bool(sign))
            kwargs[f"{sign}prompt_attention_mask{suffix}"] = torch.ones(1, length, dtype=torch.long)
    return kwargs


def control_call() -> dict[str, Any]:
    torch.manual_seed(0)  # the control image is encoded with the global generator
    return call() | {"control_image": image(32, 48)}


CASES = [
    Case("HunyuanDiTPipeline", text_to_image, call),
    Case("HunyuanDiTPAGPipeline", perturbed, call),
    Case("HunyuanDiTControlNetPipeline", control, control_call, networks=("transformer", "controlnet"), task="control"),
]
