"""Scenes: a small FLUX-class text-to-image pipeline, trained from scratch by `train.py`.

`load_pipeline()` returns an ordinary `diffusers.FluxPipeline` and `load_reward()` its CLIP's score; `CALL` holds the
keyword arguments that a model of this size needs at every call (FLUX's own defaults are 512 px and 512 text tokens).
"""

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PIPELINE = HERE / "pipeline"
CLIP = HERE / "clip"
CALL: dict[str, Any] = {"height": 32, "width": 32, "max_sequence_length": 18}


def quiet() -> None:
    """Let diffusers and transformers tell nothing but errors, and show no progress of loading."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def load_pipeline():
    """Return the trained `FluxPipeline` in float32, progress bar off."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def decoded(pipe, latents):
    """Return the images (N, 3, 32, 32) in [0, 1] of packed latents (N, 16, 16)."""
    import torch

    latents = pipe._unpack_latents(latents, CALL["height"], CALL["width"], pipe.vae_scale_factor)
    with torch.no_grad():
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
    return (images / 2 + 0.5).clamp(0, 1)


def load_reward():
    """Return the CLIP score of the scenes' own CLIP, weighed a little less than in training, 36.7 cosines."""
    from glassflows.rewards import CLIPScore

    reward = CLIPScore(CLIP)
    reward.reward_scale = 0.3
    return reward
