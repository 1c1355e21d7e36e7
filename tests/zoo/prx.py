"""PRX, in latents and in pixels."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch

from . import Case, autoencoder_kl, noise, pipeline
from .qwen import awake


def prx(name: str, in_channels: int, components: dict[str, Any], **transformer: Any) -> Any:
    torch.manual_seed(0)
    model = diffusers.PRXTransformer2DModel(
        in_channels=in_channels, patch_size=2, context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=1,
        axes_dim=[4, 4], **transformer,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return pipeline(
        name, transformer=awake(model), scheduler=scheduler, text_encoder=None, tokenizer=None, **components
    )


def latent() -> Any:
    return prx("PRXPipeline", 4, {"vae": autoencoder_kl(shift_factor=0.1)})


def call() -> dict[str, Any]:
    embeds = {"prompt_embeds": noise(1, 5, 16), "negative_prompt_embeds": noise(1, 5, 16, seed=1)}
    masks = {
        "prompt_attention_mask": torch.ones(1, 5).bool(),
        "negative_prompt_attention_mask": torch.ones(1, 5).bool(),
    }
    size = {"height": 16, "width": 24, "use_resolution_binning": False}
    return embeds | masks | size | {"prompt": None, "guidance_scale": 2.0}


CASES = [
    Case("PRXPipeline", latent, call),
    Case("PRXPixelPipeline", partial(prx, "PRXPixelPipeline", 3, {}, bottleneck_size=8, resolution_embeds=True), call),
]
