"""Rewards from functions that were written for pictures or arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

Takes = Literal["pil", "numpy"]


def as_reward(function: Callable[[Any, list[Any]], Any], takes: Takes = "pil") -> Callable[[Tensor, list[Any]], Any]:
    """Return a reward of tensors from a function of PIL images, or of arrays.

    Args:
        function: `function(images, prompts)` gets a list of N PIL images, or an array (N, H, W, 3), float32 in [0, 1],
            and returns N scores.
        takes: "pil" or "numpy".

    Raises:
        ValueError: if `takes` is neither.

    Example:
        >>> import torch
        >>> from glassflows.rewards import as_reward
        >>> redness = as_reward(lambda images, prompts: [image.getpixel((0, 0))[0] / 255 for image in images])
        >>> redness(torch.ones(2, 3, 4, 4), ["a cat", "a dog"])
        [1.0, 1.0]
    """
    if takes not in get_args(Takes):
        raise ValueError(f"takes: expected one of {get_args(Takes)}, got {takes!r}")

    def reward(images: Tensor, prompts: list[Any]) -> Any:
        arrays = images.detach().float().cpu().movedim(-3, -1).contiguous().numpy()
        return function(VaeImageProcessor.numpy_to_pil(arrays) if takes == "pil" else arrays, prompts)

    return reward
