"""Draw scenes: 32 × 32 RGB, anti-aliased, random positions and sizes."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .grammar import COLOURS, Scene

SIZE = 32
BACKGROUND = (0.93, 0.93, 0.91)
RADII = {1: (5.0, 8.5), 2: (4.0, 6.0), 3: (3.4, 5.2), 4: (3.4, 4.4)}  # half the width, pixels, by number of objects
SIZED_RADII = {"small": (3.3, 3.8), "big": (4.8, 5.6)}  # of objects whose size is said
GAP = 1.5  # pixels left free between two objects and at the border
TRIES = 256  # placements drawn at once

_Y, _X = np.mgrid[0:SIZE, 0:SIZE] + 0.5


def coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Return the share (32, 32) of each pixel that a shape around (x, y), in pixels, covers."""
    dx, dy = _X - x, _Y - y
    if shape == "circle":
        inside = radius - np.hypot(dx, dy)
    elif shape == "square":
        inside = 0.9 * radius - np.maximum(abs(dx), abs(dy))
    else:  # upright triangle of width and height 2 · radius
        inside = np.minimum(radius - dy, (radius + dy - 2 * abs(dx)) / np.sqrt(5))
    return np.clip(inside + 0.5, 0, 1)


def along_and_across(relation: str, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how far, in pixels, the centre `first` lies from `second` as the relation asks, and how far beside that.

    Args:
        relation: One of the grammar's.
        first: Centres (x to the right, y down), shape (…, 2).
        second: Centres, shape (…, 2).
    """
    dx, dy = np.moveaxis(second - first, -1, 0)
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    return (along if relation in ("left of", "above") else -along), abs(across)


def stand(relation: str, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return whether centres (…, 2) clearly stand in a relation, shape (…,)."""
    along, across = along_and_across(relation, first, second)
    return along > 1.3 * across


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw one image (3, 32, 32), float32 in [0, 1], of a scene."""
    return paint(scene, *place(scene, rng))


def place(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw where the objects of a scene lie: centres (n, 2) and radii (n,), in pixels."""
    number = len(scene.objects)
    ranges = [SIZED_RADII[thing.size] if thing.size else RADII[number] for thing in scene.objects]
    low, high = np.transpose(ranges)
    while True:
        radii = rng.uniform(low, high, (TRIES, number))
        edge = radii[..., None] + GAP
        centres = rng.uniform(edge, SIZE - edge, (TRIES, number, 2))
        fits = np.ones(TRIES, bool)
        for i in range(number):
            for j in range(i):
                distance = abs(centres[:, i] - centres[:, j]).max(-1)
                fits &= distance > radii[:, i] + radii[:, j] + GAP
        for one, relation, other in scene.related:
            fits &= stand(relation, centres[:, one], centres[:, other])
        if fits.any():
            return centres[fits.argmax()], radii[fits.argmax()]


def paint(scene: Scene, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Return the image of a scene whose objects have been placed."""
    image = np.empty((3, SIZE, SIZE))
    image[:] = np.reshape(BACKGROUND, (3, 1, 1))
    for thing, (x, y), radius in zip(scene.objects, centres, radii, strict=True):
        alpha = coverage(thing.shape, x, y, radius)
        image = image * (1 - alpha) + np.reshape(COLOURS[thing.colour], (3, 1, 1)) * alpha
    return image.astype(np.float32)


def holds(asked: Scene, drawn: Scene, centres: np.ndarray, radii: np.ndarray) -> bool:
    """Return whether what one scene asks for is true of the placed objects of another; the judge has no part in it."""
    if Counter(asked.kinds) != Counter(drawn.kinds):
        return False
    where = [drawn.kinds.index(kind) for kind in asked.kinds]
    small, big = SIZED_RADII["small"][1], SIZED_RADII["big"][0]
    if asked.is_count:
        where = list(range(len(where)))
    sized = all(
        thing.size is None or (radii[i] <= small if thing.size == "small" else radii[i] >= big)
        for thing, i in zip(asked.objects, where, strict=True)
    )
    return sized and all(
        stand(relation, centres[where[one]], centres[where[other]]) for one, relation, other in asked.related
    )
