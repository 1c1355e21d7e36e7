"""Kandinsky 5: flow matching in latents whose channels come last, for images and videos."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from zoo import Case, autoencoder_kl, image, noise, pipeline

TOKENS, QWEN, CLIP, CHANNELS = 5, 24, 16, 4


def transformer(conditioned: bool) -> Any:
    return diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=CHANNELS, out_visual_dim=CHANNELS, in_text_dim=QWEN, in_text_dim2=CLIP, time_dim=16,
        model_dim=16, ff_dim=24, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 2, 2), visual_cond=conditioned,
    )  # fmt: skip


def build(name: str, vae: Any, conditioned: bool, shift: float) -> Any:
    torch.manual_seed(0)
    return pipeline(
        name, transformer=transformer(conditioned), vae=vae, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
    )  # fmt: skip


def image_pipeline(name: str, conditioned: bool) -> Any:
    vae = autoencoder_kl(
        CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    pipe = build(name, vae, conditioned, shift=3.0)
    pipe.resolutions = [(48, 32)]  # (width, height); every other size is replaced by one of these
    return pipe


def video_pipeline(name: str) -> Any:
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=False,
    )  # fmt: skip
    return build(name, vae, conditioned=True, shift=5.0)


def prompt() -> dict[str, Any]:
    return {
        "prompt_embeds_qwen": noise(1, TOKENS, QWEN), "prompt_embeds_clip": noise(1, CLIP),
        "prompt_cu_seqlens": torch.tensor([0, TOKENS], dtype=torch.int32),
        "negative_prompt_embeds_qwen": noise(1, TOKENS - 1, QWEN, seed=1),
        "negative_prompt_embeds_clip": noise(1, CLIP, seed=1),
        "negative_prompt_cu_seqlens": torch.tensor([0, TOKENS - 1], dtype=torch.int32),
        "height": 32, "width": 48,
    }  # fmt: skip


CASES = [
    Case("Kandinsky5T2IPipeline", lambda: image_pipeline("Kandinsky5T2IPipeline", False), prompt),
    Case(
        "Kandinsky5I2IPipeline",
        lambda: image_pipeline("Kandinsky5I2IPipeline", True),
        lambda: prompt() | {"image": image(32, 48)},
        task="edit",
    ),
    Case(
        "Kandinsky5T2VPipeline",
        lambda: video_pipeline("Kandinsky5T2VPipeline"),
        lambda: prompt() | {"num_frames": 5},
        task="video",
    ),
    Case(
        "Kandinsky5I2VPipeline",
        lambda: video_pipeline("Kandinsky5I2VPipeline"),
        # It matches the first four latent frames' statistics to the later ones', which have to exist.
        lambda: prompt() | {"num_frames": 17, "image": image(32, 48)},
        task="video",
    ),
]
