"""How different the particles of a prompt still are: by descent, and by how their samples look."""

from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS = 1 << 14  # of a prompt's flattened samples that are float64 at a time
_MANY = 512
"""Particles of a prompt from which on a part of them, evenly spaced, stands for all."""


def num_lineages(ancestors: Tensor) -> Tensor:
    """Return how many slots of the first scoring have final descendants, shape (P,), int64.

    Args:
        ancestors: Parent slots within the group at each scoring, shape (S, P, K), −1 in those that
            did not live on; without a scoring every slot is its own lineage.
    """
    groups, particles = ancestors.shape[1:]
    final = int((ancestors[-1, 0] >= 0).sum()) if len(ancestors) else particles
    slots = torch.arange(final, device=ancestors.device).expand(groups, final)
    for parents in ancestors.flip(0):
        slots = parents.gather(1, slots)
    return slots.new_zeros(groups, particles).scatter(1, slots, 1).sum(1)


@torch.no_grad()
def mean_distance(samples: Tensor, particles: int) -> Tensor:
    """Return the mean distance of two samples of a prompt, shape (P,), float64 on the CPU.

        mean over i < j of √(mean (a_i − a_j)²)

    It is in the units of the samples, from 0 to 1 for images in [0, 1]. Differences are taken and
    summed in float64: copies are exactly 0 apart. One sample has no distance: 0. Of more than 512
    particles 512 at the most, evenly spaced, are compared. Besides a copy of one prompt's samples
    it takes little memory.

    Args:
        samples: Samples of any shape, prompt-major, (P · K, …).
        particles: K.
    """
    means = []
    for group in samples.split(int(particles)):  # whole, but perhaps numpy's
        group = group[:: -(-len(group) // _MANY)]
        rows = group.cpu().reshape(len(group), -1)
        squares = torch.zeros(len(rows) * (len(rows) - 1) // 2, dtype=torch.float64)
        for part in rows.split(_COLUMNS, 1):
            squares += torch.pdist(part.double()).square()
        means.append((squares / rows.shape[1]).sqrt().sum() / max(1, len(squares)))
    return torch.stack(means)
