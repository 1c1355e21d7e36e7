"""The judge: read colours, shapes, counts and relations off an image by rules, as GenEval does with a detector."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from .draw import BACKGROUND
from .grammar import COLOURS, parse

MIN_AREA = 12.0  # pixels; smaller specks are no objects
_RAYS = np.array([np.subtract(colour, BACKGROUND) for colour in COLOURS.values()])  # from background to colour


@dataclass(frozen=True)
class Found:
    """One object read off an image: its colour, its shape and its centre (x to the right, y down, in pixels)."""

    colour: str
    shape: str
    x: float
    y: float


def find_objects(image: np.ndarray) -> list[Found]:
    """Return the objects in an image (3, H, W) with values in [0, 1]."""
    offset = np.moveaxis(np.asarray(image, np.float64), 0, -1) - BACKGROUND
    alpha = np.clip(offset @ _RAYS.T / (_RAYS**2).sum(1), 0, 1)  # coverage of each pixel by each colour
    misfit = np.linalg.norm(offset[..., None, :] - alpha[..., None] * _RAYS, axis=-1)
    nearest = misfit.argmin(-1)
    opacity = np.take_along_axis(alpha, nearest[..., None], -1)[..., 0]

    found = []
    regions, number = cast("tuple[np.ndarray, int]", ndimage.label(opacity > 0.5))
    for region in range(1, number + 1):
        inside = regions == region
        votes = np.bincount(nearest[inside], opacity[inside], len(COLOURS))
        body = ndimage.binary_dilation(inside) & (inside | (regions == 0))
        mass = np.where(body, opacity, 0)
        if mass.sum() < MIN_AREA:
            continue
        clean = votes.max() > 0.7 * votes.sum()
        colour = list(COLOURS)[votes.argmax()] if clean else "mixed"
        y, x = cast("tuple[float, float]", ndimage.center_of_mass(mass))
        found.append(Found(colour, _shape(mass), x, y))
    return found


def _shape(mass: np.ndarray) -> str:
    """Tell a shape by the share of its bounding box that it fills: square 1, circle .79, triangle .5."""
    width, height = mass.sum(1).max(), mass.sum(0).max()
    if not 0.7 < width / height < 1.4:
        return "blob"
    fill = mass.sum() / (width * height)
    return "square" if fill > 0.895 else "circle" if fill > 0.70 else "triangle"


def is_correct(image: np.ndarray, prompt: str) -> bool:
    """Return whether an image (3, H, W) in [0, 1] shows exactly what a prompt of the grammar asks for."""
    scene, found = parse(prompt), find_objects(image)
    if Counter((thing.colour, thing.shape) for thing in found) != Counter(scene.objects):
        return False
    if scene.relation is None:
        return True
    first, second = (next(f for f in found if (f.colour, f.shape) == kind) for kind in scene.objects)
    dx, dy = second.x - first.x, second.y - first.y
    along, across = (dx, dy) if scene.relation in ("left of", "right of") else (dy, dx)
    return (along if scene.relation in ("left of", "above") else -along) > abs(across)


def score(image: np.ndarray, prompt: str) -> float:
    """Return how much of a prompt an image (3, H, W) in [0, 1] shows, from −1 to 2.

    The share of objects that are both wanted and found among those that are either, and, where a relation is asked for
    and its objects are there, the cosine of the angle between what is asked for and what is seen.
    """
    scene, found = parse(prompt), find_objects(image)
    wanted, seen = Counter(scene.objects), Counter((thing.colour, thing.shape) for thing in found)
    points = (wanted & seen).total() / (wanted | seen).total()
    if scene.relation is None or not wanted <= seen:
        return points
    first, second = (next(f for f in found if (f.colour, f.shape) == kind) for kind in scene.objects)
    dx, dy = second.x - first.x, second.y - first.y
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[scene.relation]
    return points + along / max(float(np.hypot(dx, dy)), 1e-6)


class RuleReward:
    """The score by rules as a reward of images (N, 3, H, W)."""

    reward_scale = 5.0

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return torch.tensor([score(one.cpu().numpy(), prompt) for one, prompt in zip(images, prompts, strict=True)])


def verdicts(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Return which of the images (N, 3, H, W) are correct for their prompts, shape (N,), bool."""
    return np.array([is_correct(image, prompt) for image, prompt in zip(images, prompts, strict=True)])
