"""LTX-Video: text, first frame, keyframes and long multi-prompt videos."""

from __future__ import annotations

import string
from typing import Any

import diffusers
import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from zoo import Case, image, noise, pipeline

SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024,
         "max_image_seq_len": 4096, "shift_terminal": 0.1}  # fmt: skip


def t5() -> dict[str, Any]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in string.ascii_lowercase)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return {"text_encoder": T5EncoderModel(config), "tokenizer": tokenizer}


def build(name: str, scheduler: Any, timestep_conditioning: bool = False, text: bool = False) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=1, caption_channels=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2, spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True), layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        decoder_inject_noise=(False,) * 3, downsample_type=("conv", "conv"), upsample_residual=(False, False),
        upsample_factor=(1, 1), patch_size=4, timestep_conditioning=timestep_conditioning, scaling_factor=0.7,
    )  # fmt: skip
    vae.latents_mean, vae.latents_std = 0.3 * noise(8), 1 + 0.1 * noise(8, seed=1)
    encoder = t5() if text else {"text_encoder": None, "tokenizer": None}
    return pipeline(name, scheduler=scheduler, vae=vae, transformer=transformer, **encoder)


def call(**more: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 5, 16), "negative_prompt_embeds": noise(1, 5, 16, seed=1),
        "prompt_attention_mask": torch.ones(1, 5), "negative_prompt_attention_mask": torch.ones(1, 5),
        "height": 32, "width": 64, "num_frames": 9, **more,
    }  # fmt: skip


def flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def keyframes() -> dict[str, Any]:
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    first = LTXVideoCondition(image=image(32, 64), frame_index=0, strength=0.7)
    last = LTXVideoCondition(image=image(32, 64, seed=1), frame_index=8)
    return call(conditions=[first, last], decode_timestep=0.05, decode_noise_scale=0.025)


def long() -> dict[str, Any]:
    return {
        "prompt": "a fox | a bear", "negative_prompt": "blurry", "guidance_scale": 3.0, "cond_image": image(32, 64),
        "height": 32, "width": 64, "num_frames": 21, "temporal_tile_size": 16, "temporal_overlap": 8, "seed": None,
        "decode_horizontal_tiles": 1, "decode_vertical_tiles": 1, "max_sequence_length": 8,
    }  # fmt: skip


CASES = [
    Case("LTXPipeline", lambda: build("LTXPipeline", flow(**SHIFT)), call),
    Case(
        "LTXImageToVideoPipeline",
        lambda: build("LTXImageToVideoPipeline", flow(**SHIFT)),
        lambda: call(image=image(32, 64)),
        task="video",
    ),
    Case(
        "LTXConditionPipeline",
        lambda: build("LTXConditionPipeline", flow(), timestep_conditioning=True),
        keyframes,
        task="video",
    ),
    Case(
        "LTXI2VLongMultiPromptPipeline",
        lambda: build("LTXI2VLongMultiPromptPipeline", diffusers.LTXEulerAncestralRFScheduler(), text=True),
        long,
        task="video",
    ),
]
