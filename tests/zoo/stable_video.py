"""Stable Video Diffusion: a picture comes alive, on an EDM schedule with continuous time."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.utils import numpy_to_pil
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from zoo import Case, image, pipeline


def build() -> Any:
    from transformers import CLIPImageProcessor

    torch.manual_seed(0)
    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32), layers_per_block=1, sample_size=8, num_attention_heads=(1, 1),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=16,
        projection_class_embeddings_input_dim=24, addition_time_embed_dim=8, num_frames=3,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, sample_size=16
    )
    encoder = CLIPVisionConfig(
        hidden_size=16, projection_dim=16, num_hidden_layers=1, num_attention_heads=2, image_size=224,
        intermediate_size=16, patch_size=56,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        sigma_min=0.002, sigma_max=700.0, steps_offset=1, timestep_spacing="leading", timestep_type="continuous",
        use_karras_sigmas=True,
    )  # fmt: skip
    return pipeline(
        "StableVideoDiffusionPipeline", vae=vae, image_encoder=CLIPVisionModelWithProjection(encoder), unet=unet,
        scheduler=scheduler, feature_extractor=CLIPImageProcessor(),
    )  # fmt: skip


def call() -> dict[str, Any]:
    picture = numpy_to_pil(image(16, 24)[0].permute(1, 2, 0).numpy())[0]
    return {"image": picture, "height": 16, "width": 24, "num_frames": 3, "decode_chunk_size": 2}


CASES = [Case("StableVideoDiffusionPipeline", build, call, networks=("unet",), task="video")]
