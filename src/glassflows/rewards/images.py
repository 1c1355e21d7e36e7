"""Images as rewards take them, and as the networks of rewards take them.

Rewards take images of any size, values in [0, 1]: PIL images, or a tensor (N, 3, H, W). Networks
take squares of one size, normalised. All functions are differentiable in a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Images = Tensor | Image | Sequence[Image]


def as_tensors(images: Images) -> list[Tensor]:
    """Return images as tensors (n, 3, H, W) in [0, 1].

    The list holds one tensor of all images, or one tensor per image if PIL images differ in size.

    Grey PIL images are taken as images of three equal channels. White is 65535 in those of 16 bits,
    and 1 in those of floats.

    Raises:
        ValueError: if a tensor is not (N, 3, H, W), not of floats, outside [0, 1] or NaN; if a PIL
            image is of 32-bit integers, or of floats outside [0, 1].
    """
    if isinstance(images, Tensor):
        return [_checked(images)]
    pictures = [images] if isinstance(images, Image) else list(images)
    if not all(isinstance(picture, Image) for picture in pictures):
        kinds = sorted({type(picture).__name__ for picture in pictures})
        raise ValueError(
            "images: expected a tensor (N, 3, H, W) or PIL images, got a list of "
            f"{', '.join(kinds)}"
        )
    if not pictures:
        raise ValueError("images: expected at least one, got none")
    tensors = [_tensor(picture) for picture in pictures]
    return [torch.cat(tensors)] if len({one.shape for one in tensors}) == 1 else tensors


def _tensor(picture: Image) -> Tensor:
    """Return a PIL image as a tensor (1, 3, H, W).

    PIL itself would cut off at 255 what it converts from 16 bits or from floats.
    """
    if picture.mode == "I":
        raise ValueError(
            "images: expected PIL images of a known white, got mode I (32-bit integers), whose "
            "white may be 255, 65535 or another: scale them to bytes (mode L), or to floats in "
            "[0, 1] (mode F)"
        )
    if picture.mode == "F" or picture.mode.startswith("I;16"):
        white = 1 if picture.mode == "F" else 65535
        grey = torch.from_numpy(np.asarray(picture).astype(np.float32) / white)
        return _checked(grey.expand(1, 3, -1, -1))
    return torch.from_numpy(VaeImageProcessor.pil_to_numpy(picture.convert("RGB"))).movedim(-1, 1)


def _checked(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images: expected shape (N, 3, H, W), got {tuple(images.shape)}: {_advice(images)}"
        )
    if not images.is_floating_point():
        white = 65535 if images.dtype == torch.uint16 else 255
        raise ValueError(
            f"images: expected floats in [0, 1], got {images.dtype}: divide by {white}"
        )
    if not len(images):
        raise ValueError("images: expected at least one, got none")
    low, high = images.detach().aminmax()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # false of NaN, too
        raise ValueError(
            f"images: expected values in [0, 1], got {float(low):.4g} to {float(high):.4g}: "
            "images in [-1, 1] are mapped by (images + 1) / 2, those in [0, 255] by images / 255; "
            "NaN most often comes from a decoder in half precision"
        )
    return images


def _advice(images: Tensor) -> str:
    """Return how a tensor of another shape becomes images (N, 3, H, W)."""
    if images.ndim == 3 and 3 in (images.shape[0], images.shape[-1]):
        return "one image is a batch of one: images[None]"
    if images.ndim == 4 and images.shape[-1] == 3:
        return "put the channels second, after the images: images.movedim(-1, 1)"
    if images.ndim == 4 and images.shape[1] == 1:
        return "give grey images three equal channels: images.expand(-1, 3, -1, -1)"
    return "give images of red, green and blue, the channels second (latents are decoded first)"


def pictures_of(images: Tensor, reward: Any) -> list[Image]:
    """Return images (N, 3, H, W) in [0, 1] as PIL images, for a reward that works on these.

    Raises:
        ValueError: if they require a gradient, which the reward has none for.
    """
    if images.requires_grad:
        raise ValueError(
            f"images require a gradient; {type(reward).__name__} has none: detach them"
        )
    return VaeImageProcessor.numpy_to_pil(images.float().cpu().movedim(1, -1).numpy())


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (images − mean) / std, with one mean and std per channel."""
    shift, scale = (images.new_tensor(value).view(3, 1, 1) for value in (mean, std))
    return (images - shift) / scale


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Return images of another size, by bicubic interpolation with antialiasing.

    PIL does the same, except that it rounds.
    """
    # PIL's two passes, each of which ends in [0, 1]
    for size in ((images.shape[-2], width), (height, width)):
        if images.shape[-2:] != size:
            images = interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    return images


def cropped(images: Tensor, size: int, rounded: Callable[[float], int] = math.floor) -> Tensor:
    """Scale the shorter side to `size` and take the square in the middle.

    Args:
        images: Shape (N, 3, H, W).
        size: Side of the square, in pixels.
        rounded: Rounds the first row and column of the square: down in transformers' processors, to
            even in torchvision's.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    images = resized(images, int(size * height / short), int(size * width / short))
    top, left = (rounded((side - size) / 2) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def padded(images: Tensor, size: int) -> Tensor:
    """Scale the longer side to `size` and pad the other with black on both sides."""
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    images = resized(images, max(1, round(height * scale)), max(1, round(width * scale)))
    above, left = ((size - side) // 2 for side in images.shape[-2:])
    below, right = size - images.shape[-2] - above, size - images.shape[-1] - left
    return pad(images, (left, right, above, below))
