"""BestOfN: the baseline that moves nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..scheduler.hooks import Boundary
from ..smc.weights import log_mean, normalise
from .strategy import Decision, Generators, Outcome


@dataclass(frozen=True)
class BestOfN:
    """Draw K particles, score the final ones only, and return the best first.

    The particles are samples of the model, weighed for p(z) exp(λ_r r(z)).

    Args:
        reward_scale: λ_r; None takes `reward.reward_scale` where the reward has one, else 1.
    """

    reward_scale: float | None = None

    def due(self, at: Boundary) -> bool:
        return False

    def init(self, groups: int, particles: int) -> None:
        return None

    def step(
        self, state: None, rewards: Tensor, at: Boundary, generators: Generators
    ) -> tuple[None, Decision]:
        return None, Decision.keep(rewards)

    def finish(self, state: None, rewards: Tensor, total: int) -> Outcome:
        scale = 1.0 if self.reward_scale is None else self.reward_scale
        scales = torch.full(rewards.shape[:1], scale, dtype=torch.float64)
        return Outcome(normalise(scale * rewards), log_mean(scale * rewards), scales)
