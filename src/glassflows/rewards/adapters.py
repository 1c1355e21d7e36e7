"""Rewards from functions of pictures or arrays.

A reward takes tensors. Pictures are PIL images, and arrays are numpy's, channels last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

Takes = Literal["pil", "numpy"]


def as_reward(
    function: Callable[[Any, list[Any]], Any], takes: Takes = "pil"
) -> Callable[[Tensor, list[Any]], Any]:
    """Return a reward of tensors from a function of PIL images or of arrays.

    Args:
        function: `function(images, prompts)` returns N scores. It gets a list of N PIL images (for
            videos, of N lists of frames), or an array (N, H, W, 3) or (N, frames, H, W, 3), float32
            in [0, 1]. Grey images are PIL images of mode L, or arrays of one channel. Sound is an
            array (N, channels, samples).
        takes: What the function takes, "pil" or "numpy".

    Raises:
        ValueError: if `takes` is neither; from the reward, if pictures are to be made of sound or
            of a tensor that is no batch of images.

    Example:
        >>> import torch
        >>> from glassflows.rewards import as_reward
        >>> def redness(images, prompts):
        ...     return [image.getpixel((0, 0))[0] / 255 for image in images]
        >>> as_reward(redness)(torch.ones(2, 3, 4, 4), ["a cat", "a dog"])
        [1.0, 1.0]
    """
    if takes not in get_args(Takes):
        raise ValueError(f"takes: expected one of {get_args(Takes)}, got {takes!r}")

    def reward(images: Tensor, prompts: list[Any]) -> Any:
        last = images.movedim(-3, -1) if images.ndim > 3 else images
        arrays = last.detach().float().cpu().numpy().copy()
        if takes == "numpy":
            return function(arrays, prompts)
        if arrays.ndim < 4 or arrays.shape[-1] not in (1, 3, 4):
            raise ValueError(
                "images: expected shape (N, 3, H, W) or (N, frames, 3, H, W), got "
                f"{tuple(images.shape)}: one image is a batch of one, images[None]; there are no "
                'pictures of sound: use as_reward(…, takes="numpy")'
            )
        films = [
            VaeImageProcessor.numpy_to_pil(film)
            for film in arrays.reshape(len(arrays), -1, *arrays.shape[-3:])
        ]
        return function([film[0] for film in films] if arrays.ndim == 4 else films, prompts)

    return reward
