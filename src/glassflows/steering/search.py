"""Searches: strategies that look for a high reward and sample no known law."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..scheduler.hooks import Boundary
from .strategy import Decision, Generators, Outcome, check_whole, described


@dataclass(frozen=True, repr=False)
class BeamSearch:
    """Keep the best particles of each prompt at every boundary, with equally many children each.

    Where nothing random follows, at the start of a last transition of one network call, children
    would be copies: there every particle goes on, unscored.

    Args:
        width: Number of particles kept; it must divide K.

    Raises:
        ValueError: if the width is no whole number of at least 1, or does not divide K.
    """

    width: int = 2
    moves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_whole("width", self.width)

    def __repr__(self) -> str:
        return described(self)

    def due(self, at: Boundary) -> bool:
        return at.stochastic

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
        device = rewards.device
        moved = torch.full(rewards.shape[:1], children > 1, device=device)
        ess = torch.full(rewards.shape[:1], float(self.width), dtype=torch.float64, device=device)
        return None, Decision(ancestors, moved, ess, rewards)

    def finish(self, state: None, rewards: Tensor, total: int) -> Outcome:
        return Outcome.without_law(rewards)
