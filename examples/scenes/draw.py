"""Draw scenes: 32 × 32 RGB, anti-aliased, random positions and sizes."""

from __future__ import annotations

import numpy as np

from .grammar import COLOURS, Scene

SIZE = 32
BACKGROUND = (0.93, 0.93, 0.91)
RADII = {1: (5.0, 8.5), 2: (4.0, 6.0), 3: (3.6, 5.0)}  # half the width of an object, pixels, by number of objects
GAP = 1.5  # pixels left free between two objects and at the border

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


def fits(relation: str | None, first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether two centres clearly stand in a relation."""
    dx, dy = second - first
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    if relation in ("right of", "below"):
        along = -along
    return relation is None or along > 1.3 * abs(across)


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw one image (3, 32, 32), float32 in [0, 1], of a scene."""
    return paint(scene, *place(scene, rng))


def place(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw where the objects of a scene lie: centres (n, 2) and radii (n,), in pixels."""
    number = len(scene.objects)
    while True:
        radii = rng.uniform(*RADII[number], number)
        centres = rng.uniform(radii + GAP, SIZE - radii - GAP, (2, number)).T
        apart = all(
            abs(centres[i] - centres[j]).max() > radii[i] + radii[j] + GAP for i in range(number) for j in range(i)
        )
        if apart and (number != 2 or fits(scene.relation, *centres)):
            return centres, radii


def paint(scene: Scene, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Return the image of a scene whose objects have been placed."""
    image = np.empty((3, SIZE, SIZE))
    image[:] = np.reshape(BACKGROUND, (3, 1, 1))
    for (colour, shape), (x, y), radius in zip(scene.objects, centres, radii, strict=True):
        alpha = coverage(shape, x, y, radius)
        image = image * (1 - alpha) + np.reshape(COLOURS[colour], (3, 1, 1)) * alpha
    return image.astype(np.float32)
