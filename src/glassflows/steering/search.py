"""Searches: strategies that look for a high reward and sample no known law."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..scheduler.hooks import Boundary
from .strategy import Decision, Generators, Outcome


@dataclass(frozen=True)
class BeamSearch:
    """Keep the best particles of each prompt at every boundary, with equally many children each.

    Args:
        width: Number of particles kept; it must divide K.

    Raises:
        ValueError: if the width is less than 1 or does not divide K.
    """

    width: int = 2

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width: expected at least 1, got {self.width}")

    def due(self, at: Boundary) -> bool:
        return True

    def init(self, groups: int, particles: int) -> None:
        if particles % self.width:
            raise ValueError(
                f"width: expected a divisor of num_particles={particles}, got {self.width}: each "
                "of the best has equally many children"
            )

    def step(
        self, state: None, rewards: Tensor, at: Boundary, generators: Generators
    ) -> tuple[None, Decision]:
        best = rewards.argsort(dim=-1, descending=True, stable=True)[:, : self.width]
        children = rewards.shape[1] // self.width
        ancestors = best.sort(-1).values.repeat_interleave(children, 1)
        moved = torch.full(rewards.shape[:1], children > 1)
        ess = torch.full(rewards.shape[:1], float(self.width), dtype=torch.float64)
        return None, Decision(ancestors, moved, ess)

    def finish(self, state: None, rewards: Tensor, total: int) -> Outcome:
        return Outcome.without_law(rewards)
