"""The judge: read colours, shapes, sizes, counts and relations off an image by rules, as GenEval does by a detector."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from .draw import BACKGROUND, SIZED_RADII, along_and_across, coverage
from .grammar import COLOURS, Scene, parse

Judge = Callable[[np.ndarray, list[str]], np.ndarray]
"""Says which of N images (N, 3, H, W) are right for their prompts, shape (N,), bool."""

MIN_AREA = 12.0  # pixels; smaller specks are no objects
BIG = (SIZED_RADII["small"][1] + SIZED_RADII["big"][0]) / 2  # half the width, pixels, from which on an object is big
AREAS = {"circle": np.pi, "square": 1.8**2, "triangle": 2.0}  # of half a width of one pixel
MAX_MISFIT = 0.25  # of its area, by which an object may differ from a shape
_RAYS = np.array([np.subtract(colour, BACKGROUND) for colour in COLOURS.values()])  # from background to colour


@dataclass(frozen=True)
class Found:
    """One object read off an image: its colour, shape, half its width and centre (x to the right, y down), pixels."""

    colour: str
    shape: str
    radius: float
    x: float
    y: float

    @property
    def kind(self) -> tuple[str, str]:
        return self.colour, self.shape

    @property
    def size(self) -> str:
        return "big" if self.radius > BIG else "small"


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
        x, y = x + 0.5, y + 0.5  # the middle of a pixel
        found.append(Found(colour, *_shape(mass, x, y), x, y))
    return found


def _shape(mass: np.ndarray, x: float, y: float) -> tuple[str, float]:
    """Return the shape of the same area and centroid that is nearest, or "blob" if none is near, and half its width."""
    misfits = {}
    for shape, area in AREAS.items():
        radius = float(np.sqrt(mass.sum() / area))
        middle = y - radius / 3 if shape == "triangle" else y
        misfits[shape] = abs(mass - coverage(shape, x, middle, radius)).sum() / mass.sum(), radius
    shape = min(misfits, key=misfits.__getitem__)
    misfit, radius = misfits[shape]
    return (shape if misfit < MAX_MISFIT else "blob"), radius


@dataclass(frozen=True)
class Reading:
    """What an image shows of what a scene asks for.

    Args:
        others: How many objects there are that were not asked for.
        objects: For each kind asked for, the share of its objects that is found, at most 1.
        relations: For each relation the cosine of the angle between what is asked for and what is seen; −1 where one
            of its objects is not found.
        sizes: For each kind whose size is said, 1 if all found have it; 0 where none is found.
    """

    others: int
    objects: tuple[float, ...]
    relations: tuple[float, ...]
    sizes: tuple[float, ...]

    @property
    def criteria(self) -> tuple[float, ...]:
        """All that is asked for, each as the degree to which it is met, 1 at most."""
        return self.objects + self.relations + self.sizes

    @property
    def is_correct(self) -> bool:
        """Whether the objects are exactly those asked for, of the sizes said, and within 45° of each relation."""
        return not self.others and all(map(is_met, self.criteria))


def is_met(criterion: float) -> bool:
    """Return whether a criterion is met: a share is whole, an angle within 45°."""
    return criterion > np.sqrt(0.5)


def read(image: np.ndarray, scene: Scene) -> Reading:
    """Read an image (3, H, W) in [0, 1] for a scene."""
    found = find_objects(image)
    wanted, seen = Counter(scene.kinds), Counter(thing.kind for thing in found)
    of_kind = {kind: [thing for thing in found if thing.kind == kind] for kind in wanted}
    relations = []
    for one, relation, other in scene.related:
        pair = scene.kinds[one], scene.kinds[other]
        if not all(of_kind[kind] for kind in pair):
            relations.append(-1.0)
            continue
        first, second = (np.array([of_kind[kind][0].x, of_kind[kind][0].y]) for kind in pair)
        along, across = along_and_across(relation, first, second)
        relations.append(float(along / max(np.hypot(along, across), 1e-6)))
    return Reading(
        others=(seen - wanted).total(),
        objects=tuple(min(seen[kind] / number, 1.0) for kind, number in wanted.items()),
        relations=tuple(relations),
        sizes=tuple(
            float(bool(of_kind[kind]) and all(thing.size == size for thing in of_kind[kind]))
            for kind, size in dict.fromkeys((thing.kind, thing.size) for thing in scene.objects)
            if size
        ),
    )


def is_correct(image: np.ndarray, prompt: str) -> bool:
    """Return whether an image (3, H, W) in [0, 1] shows exactly what a prompt of the grammar asks for."""
    return read(image, parse(prompt)).is_correct


class RuleReward:
    """A score by rules as a reward of images (N, 3, H, W): the mean of every second criterion, of 100."""

    reward_scale = 0.3

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        readings = (read(one.cpu().numpy(), parse(prompt)) for one, prompt in zip(images, prompts, strict=True))
        return torch.tensor([100 * float(np.mean(reading.criteria[::2])) for reading in readings])


def percent_right(judge: Judge, images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Return a judge's verdict on each of K images of P prompts (P, K, 3, H, W), percent, shape (P, K)."""
    number, each = images.shape[:2]
    found = judge(images.reshape(-1, *images.shape[2:]), [prompt for prompt in prompts for _ in range(each)])
    return 100.0 * found.reshape(number, each)


def other_verdicts(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Return which images (N, 3, H, W) meet every criterion that `RuleReward` does not read, shape (N,), bool."""
    readings = (read(image, parse(prompt)) for image, prompt in zip(images, prompts, strict=True))
    return np.array([all(map(is_met, reading.criteria[1::2])) for reading in readings])


def verdicts(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Return which of the images (N, 3, H, W) are correct for their prompts, shape (N,), bool."""
    return np.array([is_correct(image, prompt) for image, prompt in zip(images, prompts, strict=True)])
