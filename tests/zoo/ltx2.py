"""LTX-2: video and audio together, from text, a first frame, keyframes or a reference video."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from zoo import Case, image, noise, pipeline


def build(name: str, **scheduler: Any) -> Any:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    torch.manual_seed(0)
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=1, caption_channels=8, rope_double_precision=False, rope_type="split",
        vae_scale_factors=(4, 16, 16),
    )  # fmt: skip
    size = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "num_learnable_registers": None}
    sizes = {f"{stream}_connector_{key}": value for stream in ("video", "audio") for key, value in size.items()}
    connectors = LTX2TextConnectors(
        caption_channels=8, text_proj_in_factor=2, connector_rope_base_seq_len=16, rope_double_precision=False,
        rope_type="split", **sizes,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        down_block_types=("LTX2VideoDownBlock3D",) * 2, layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True), decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3, downsample_type=("spatiotemporal",) * 2, upsample_residual=(False, False),
        upsample_factor=(1, 1), patch_size=4, scaling_factor=0.7,
    )  # fmt: skip
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, in_channels=2, resolution=32,
        latent_channels=2, norm_type="pixel", causality_axis="height", mid_block_add_attention=False,
        sample_rate=16000, mel_hop_length=160, is_causal=True, mel_bins=8,
    )  # fmt: skip
    vae.latents_mean, vae.latents_std = 0.3 * noise(4), 1 + 0.1 * noise(4, seed=1)
    audio_vae.latents_mean, audio_vae.latents_std = 0.3 * noise(4), 1 + 0.1 * noise(4, seed=1)
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=8, out_channels=2, upsample_kernel_sizes=[4], upsample_factors=[2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3]], output_sampling_rate=16000,
    )  # fmt: skip
    shift = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024,
             "max_image_seq_len": 4096, "shift_terminal": 0.1}  # fmt: skip
    return pipeline(
        name, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**shift, **scheduler), vae=vae, audio_vae=audio_vae,
        text_encoder=None, tokenizer=None, connectors=connectors, transformer=transformer, vocoder=vocoder,
    )  # fmt: skip


def call(**more: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 4, 16), "negative_prompt_embeds": noise(1, 4, 16, seed=1),
        "prompt_attention_mask": torch.ones(1, 4), "negative_prompt_attention_mask": torch.ones(1, 4),
        "height": 32, "width": 64, "num_frames": 9, "frame_rate": 25.0, "spatio_temporal_guidance_blocks": [0], **more,
    }  # fmt: skip


def keyframe(index: int = 0, strength: float = 0.7) -> Any:
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    return LTX2VideoCondition(frames=image(32, 64), index=index, strength=strength, crf=0)


def hdr() -> dict[str, Any]:
    from diffusers.pipelines.ltx2 import LTX2HDRReferenceCondition

    return call(reference_conditions=LTX2HDRReferenceCondition(frames=image(32, 64, seed=1)))


def in_context() -> dict[str, Any]:
    from diffusers.pipelines.ltx2 import LTX2ReferenceCondition

    return call(reference_conditions=LTX2ReferenceCondition(frames=image(32, 64, seed=1)), conditions=keyframe())


CASES = [
    Case("LTX2Pipeline", lambda: build("LTX2Pipeline"), call),
    Case(
        "LTX2ImageToVideoPipeline",
        lambda: build("LTX2ImageToVideoPipeline"),
        lambda: call(image=image(32, 64), image_crf=0),
        task="video",
    ),
    Case(
        "LTX2ConditionPipeline",
        lambda: build("LTX2ConditionPipeline"),
        lambda: call(conditions=[keyframe(), keyframe(2, 1.0)]),
        task="video",
    ),
    Case("LTX2HDRPipeline", lambda: build("LTX2HDRPipeline"), hdr, task="video"),
    Case("LTX2InContextPipeline", lambda: build("LTX2InContextPipeline"), in_context, task="video"),
]
