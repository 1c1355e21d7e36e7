"""BestOfN: the baseline that moves nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from ..scheduler.hooks import Boundary
from ..signatures import described
from ..smc.weights import log_mean, normalise
from .strategy import Decision, Generators, Outcome


@dataclass(frozen=True, repr=False)
class BestOfN:
    """Draw K particles, score the final ones only, and return the best first.

    The particles are samples of the model, weighed for p(z) exp(λ_r r(z)).

    Args:
        reward_scale: λ_r; None takes `reward.reward_scale` where the reward has one, else 1. Of a
            negative λ_r the best particle is that of the lowest reward.

    Raises:
        ValueError: if `reward_scale` is no finite number.
    """

    reward_scale: float | None = None

    def __post_init__(self) -> None:
        scale = self.reward_scale
        if scale is not None and not (isinstance(scale, Real) and math.isfinite(scale)):
            raise ValueError(
                f"reward_scale: expected a finite number, got {scale!r}: nothing is scored on the "
                "way, where a schedule could be followed or a scale be chosen"
            )

    def __repr__(self) -> str:
        return described(self)

    def due(self, at: Boundary) -> bool:
        return False

    def init(self, groups: int, particles: int) -> Tensor:
        """Return the log-weights of particles that have moved by no law but the model's."""
        return torch.zeros(groups, particles, dtype=torch.float64, device="cpu")

    def step(
        self, state: Tensor, rewards: Tensor, at: Boundary, generators: Generators
    ) -> tuple[Tensor, Decision]:
        return state, Decision.keep(rewards)

    def scale(self, state: Tensor, at: Boundary) -> Tensor:
        """Return λ_r, shape (P, 1)."""
        return self._scale_of(state)

    def reweigh(self, state: Tensor, log_ratio: Tensor) -> Tensor:
        """Return the state of particles whose log-weights are larger by `log_ratio`, (P, K)."""
        return state + log_ratio

    def finish(self, state: Tensor, rewards: Tensor, total: int) -> Outcome:
        scale = self._scale_of(rewards)
        log_weights = state + scale * rewards
        return Outcome(normalise(log_weights), log_mean(log_weights), scale[:, 0])

    def _scale_of(self, rows: Tensor) -> Tensor:
        return torch.full_like(rows[:, :1], 1.0 if self.reward_scale is None else self.reward_scale)
