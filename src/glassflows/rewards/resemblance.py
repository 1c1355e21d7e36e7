"""Resemblance to a picture: what an edit is to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .images import Images, as_tensors, resized


class Resemblance:
    """−100 √ mean (x − y)², the root-mean-square difference of images x to a picture y, in percent.

    It is 0 for the picture itself, and some −10 for another picture of the same thing. Add it to a
    reward of the prompt: `Sum(CLIPScore(), Resemblance(picture))`. It is differentiable.

    Args:
        picture: The picture, as PIL image or tensor (1, 3, H, W) in [0, 1]; or one for each prompt,
            by the prompt.
        mask: Where images are compared, as PIL image or tensor (1, 1, H, W) or (1, 3, H, W): 1
            (white) for where, 0 for where not, and weights between. None compares everywhere.

    Pictures and mask are scaled to the size of the images.

    Raises:
        ValueError: if a picture is not one image, or the mask is 0 everywhere; at a call, for a
            prompt that has no picture.

    Example:
        >>> import torch
        >>> from glassflows.rewards import Resemblance
        >>> grey = torch.full((1, 3, 4, 4), 0.5)
        >>> Resemblance(grey)(torch.full((2, 3, 8, 8), 0.6), ["a wall", "a wall"])
        tensor([-10.0000, -10.0000])
    """

    reward_scale = 1.0

    def __init__(self, picture: Images | Mapping[str, Images], mask: Images | None = None) -> None:
        self._by_prompt: dict[str, Tensor] | None = None
        self._picture: Tensor | None = None
        if isinstance(picture, Mapping):
            if not picture:
                raise ValueError("picture: expected one for each prompt by name, got none")
            self._by_prompt = {prompt: _one(image, "picture") for prompt, image in picture.items()}
        else:
            self._picture = _one(picture, "picture")
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == 1:
            mask = mask.expand(-1, 3, -1, -1)
        self._mask = None if mask is None else _one(mask, "mask").mean(1, keepdim=True)
        if self._mask is not None and not self._mask.sum() > 0:
            raise ValueError("mask: expected white where images are compared, got none anywhere")

    def __repr__(self) -> str:
        what = "a picture" if self._by_prompt is None else f"{len(self._by_prompt)} pictures"
        return f"Resemblance({what}{'' if self._mask is None else ', within a mask'})"

    def __call__(self, images: Images, prompts: Sequence[str | None] | None = None) -> Tensor:
        """Return the scores, shape (N,)."""
        tensors = as_tensors(images)
        if len(tensors) > 1:
            raise ValueError("images: expected PIL images of one size, got several sizes")
        x = tensors[0].float()
        squares = (x - self._pictures(prompts, x).to(x)).square().mean(1)
        if self._mask is None:
            mean = squares.mean((1, 2))
        else:
            weights = resized(self._mask.to(x), *x.shape[-2:])[:, 0]
            mean = (weights * squares).sum((1, 2)) / weights.sum()
        return -100 * (mean + 1e-12).sqrt()  # whose gradient is finite where images are the same

    def _pictures(self, prompts: Sequence[str | None] | None, x: Tensor) -> Tensor:
        """Return the picture of each image, of its size, shape (N, 3, H, W) or (1, 3, H, W)."""
        if self._picture is not None:
            return resized(self._picture, *x.shape[-2:])
        known = self._by_prompt or {}
        asked = [None] * len(x) if prompts is None else list(prompts)
        if len(asked) != len(x):
            raise ValueError(f"prompts: expected one for each of {len(x)} images, got {len(asked)}")
        missing = [prompt for prompt in asked if not isinstance(prompt, str) or prompt not in known]
        if missing:
            raise ValueError(
                f"prompts: expected some of {list(known)}, which have a picture, got {missing[0]!r}"
            )
        pictures = {
            prompt: resized(known[prompt], *x.shape[-2:])  # type: ignore[index]
            for prompt in dict.fromkeys(asked)
        }
        return torch.cat([pictures[prompt] for prompt in asked])


def _one(image: Images, what: str) -> Tensor:
    """Return one image as a tensor (1, 3, H, W)."""
    tensors = as_tensors(image)
    if len(tensors) != 1 or len(tensors[0]) != 1:
        number = sum(map(len, tensors))
        raise ValueError(
            f"{what}: expected one image, got {number}: give one for each prompt by name"
        )
    return tensors[0].detach().float()
