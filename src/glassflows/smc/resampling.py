"""Draw the parents of the next generation."""

from __future__ import annotations

import torch
from torch import Tensor

from .weights import normalise


def systematic(log_weights: Tensor, uniforms: Tensor) -> Tensor:
    """Resample systematically: every particle gets ⌊K W⌋ or ⌈K W⌉ children.

        ancestor of slot i  =  min {j : W_1 + … + W_j > (i + u) / K}

    Args:
        log_weights: Shape (G, K), float64, normalised or not.
        uniforms: u, one per group, shape (G,), float64 in [0, 1 − 2⁻³²], so that (K − 1 + u)/K stays below 1.

    Returns:
        Ancestors, shape (G, K), int64, increasing in each group; never a particle of weight zero.
    """
    num_particles = log_weights.shape[-1]
    cumulative = normalise(log_weights).exp().cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]
    positions = (torch.arange(num_particles, dtype=torch.float64) + uniforms[:, None]) / num_particles
    return torch.searchsorted(cumulative, positions, right=True)


def draw_uniforms(generators: list[torch.Generator]) -> Tensor:
    """Return one u per group from its own CPU generator, shape (G,), float64, on a grid of 2⁻³² in [0, 1)."""
    draws = [torch.randint(2**32, (), generator=generator, dtype=torch.int64) for generator in generators]
    return torch.stack(draws).double() / 2**32
