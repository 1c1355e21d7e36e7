"""Searches: strategies that look for a high reward and sample no known law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..scheduler.hooks import Boundary
from ..signatures import described
from .strategy import Decision, Generators, Outcome, check_whole
from .widths import check_enough, check_first, checked_widths, new_width


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


@dataclass(frozen=True, repr=False)
class Halving:
    """Keep fewer and fewer particles of each prompt, the best ones: 16 → 8 → 4.

    The transitions are split into as many parts as there are widths, as evenly as possible, the
    first ones longer. At the start of part j > 0 the best `widths[j]` go on, and the others are
    dropped: no network, decoder or reward sees them any more. Nothing is copied, and nothing is
    scored elsewhere.

    Args:
        widths: How many particles of each prompt live in each part; the first is K, and none is
            larger than the one before it.

    Raises:
        ValueError: if the widths are no such numbers, do not begin with K, or are more than the run
            has transitions.
    """

    widths: Sequence[int]
    moves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", checked_widths(self.widths))

    def __repr__(self) -> str:
        return described(self)

    def check_run(self, at: Boundary) -> None:
        """Refuse a run of fewer transitions than widths."""
        check_enough(self.widths, at.total)

    def due(self, at: Boundary) -> bool:
        return self.width_at(at) is not None

    def init(self, groups: int, particles: int) -> None:
        check_first(self.widths, particles)

    def step(
        self, state: None, rewards: Tensor, at: Boundary, generators: Generators
    ) -> tuple[None, Decision]:
        width, everyone = self.width_at(at), Decision.keep(rewards)
        if width is None:
            return None, everyone
        best = rewards.argsort(dim=-1, descending=True, stable=True)[:, :width]
        ancestors = torch.cat([best.sort(-1).values, everyone.ancestors[:, width:]], 1)
        moved = torch.full_like(everyone.resampled, width < rewards.shape[1])
        ess = torch.full_like(everyone.ess, width)
        return None, Decision(ancestors, moved, ess, rewards, width)

    def finish(self, state: None, rewards: Tensor, total: int) -> Outcome:
        return Outcome.without_law(rewards)

    def width_at(self, at: Boundary) -> int | None:
        """Return the width to shrink to at a boundary; None where no part begins."""
        return new_width(self.widths, at.index, at.total)
