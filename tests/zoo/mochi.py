"""Mochi, whose flow runs from data to noise, and Motif-Video, which guides through a guider."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from transformers import (
    SiglipImageProcessor,
    SiglipVisionConfig,
    T5Gemma2Encoder,
    T5Gemma2EncoderConfig,
    T5Gemma2TextConfig,
)

from zoo import Case, image, noise, pipeline
from zoo.text import byte_tokenizer


def mochi() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, pooled_projection_dim=16, in_channels=12,
        text_embed_dim=16, time_embed_dim=4, max_sequence_length=8,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.pos_frequencies, std=0.1)
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32), decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return pipeline(
        "MochiPipeline", scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer
    )


def seeing_encoder() -> dict[str, Any]:
    """Return T5Gemma 2, whose eyes the pipeline reads the first frame with."""
    tokenizer = byte_tokenizer()
    text = T5Gemma2TextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, pad_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = T5Gemma2EncoderConfig(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return {
        "text_encoder": T5Gemma2Encoder(config, eoi_token_index=1),
        "tokenizer": tokenizer,
        "feature_extractor": SiglipImageProcessor(size={"height": 8, "width": 8}),
    }


def motif(name: str, guider: Any, image_embed_dim: int | None = None, **encoders: Any) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_single_layers=1,
        text_embed_dim=16, rope_axes_dim=(4, 4, 4), image_embed_dim=image_embed_dim,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[-0.2, 0.1, 0.3, -0.1], latents_std=[1.2, 0.8, 1.1, 0.9], scale_factor_temporal=2,
        scale_factor_spatial=4,
    )  # fmt: skip
    components = dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor")) | encoders
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return pipeline(name, scheduler=scheduler, vae=vae, transformer=transformer, guider=guider, **components)


def motif_from_an_image() -> Any:
    guider = diffusers.AdaptiveProjectedGuidance(guidance_scale=4.0)
    return motif("MotifVideoImage2VideoPipeline", guider, image_embed_dim=8, **seeing_encoder())


def call(**more: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 6, 16), "negative_prompt_embeds": noise(1, 6, 16, seed=1),
        "prompt_attention_mask": torch.ones(1, 6, dtype=torch.bool),
        "negative_prompt_attention_mask": torch.ones(1, 6, dtype=torch.bool), "height": 16, "width": 24, **more,
    }  # fmt: skip


CASES = [
    Case("MochiPipeline", mochi, lambda: call(height=16, width=32, num_frames=7)),
    Case(
        "MotifVideoPipeline",
        lambda: motif("MotifVideoPipeline", diffusers.ClassifierFreeGuidance(guidance_scale=4.0)),
        lambda: call(num_frames=5),
    ),
    Case(
        "MotifVideoImage2VideoPipeline",
        motif_from_an_image,
        lambda: call(prompt=None, image=image(16, 24), num_frames=5),
        task="video",
    ),
]
