"""Kandinsky 3: a text-conditioned U-Net in the latents of the earlier versions' autoencoder."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from zoo import Case, image, noise, pipeline
from zoo.kandinsky import movq

TOKENS, WIDTH = 6, 16


def kandinsky3(name: str, **scheduler: Any) -> Any:
    torch.manual_seed(0)
    unet = diffusers.Kandinsky3UNet(
        time_embedding_dim=8, groups=2, attention_head_dim=4, layers_per_block=2, block_out_channels=(8, 16),
        cross_attention_dim=8, encoder_hid_dim=WIDTH,
    )  # fmt: skip
    config = {"beta_schedule": "squaredcos_cap_v2", "beta_start": 0.00085, "beta_end": 0.02, "thresholding": False}
    return pipeline(
        name, tokenizer=None, text_encoder=None, unet=unet, movq=movq(),
        scheduler=diffusers.DDPMScheduler(**(config | scheduler)),
    )  # fmt: skip


def prompt() -> dict[str, Any]:
    present = torch.ones(1, TOKENS, dtype=torch.long)
    present[:, -1] = 0
    return {
        "prompt_embeds": noise(1, TOKENS, WIDTH), "attention_mask": present,
        "negative_prompt_embeds": torch.zeros(1, TOKENS, WIDTH), "negative_attention_mask": torch.zeros_like(present),
    }  # fmt: skip


CASES = [
    Case(
        "Kandinsky3Pipeline",
        lambda: kandinsky3("Kandinsky3Pipeline", variance_type="fixed_small"),
        lambda: prompt() | {"height": 64, "width": 128},  # latents are an eighth of the next multiple of 64
        ("unet",),
    ),
    Case(
        "Kandinsky3Img2ImgPipeline",
        lambda: kandinsky3("Kandinsky3Img2ImgPipeline", clip_sample_range=2.0),
        lambda: prompt() | {"image": image(16, 24), "strength": 0.6},
        ("unet",),
        "image",
    ),
]
