"""The protocol of a strategy: which particles go on, judged by their rewards alone.

A *group* is the K particles of one prompt; P groups run side by side and never mix. A strategy is
made of pure functions of a state of its own: `init → step → … → finish`. It sees rewards of shape
(P, K) and nothing else: no latents, no images, no pipeline.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..scheduler.hooks import Boundary

S = TypeVar("S")
Generators = list[torch.Generator]


class Decision(NamedTuple):
    """Which particles go on from a boundary.

    Args:
        ancestors: The slot in its own group that each slot goes on from, shape (P, K), int64.
        resampled: Whether a group's particles were moved, shape (P,), bool.
        ess: Effective sample size of each group before that, shape (P,), float64.
    """

    ancestors: Tensor
    resampled: Tensor
    ess: Tensor

    @classmethod
    def keep(cls, rewards: Tensor) -> Decision:
        """Return the decision by which every particle goes on."""
        groups, particles = rewards.shape
        ancestors = torch.arange(particles).expand(groups, particles).clone()
        ess = torch.full((groups,), float(particles), dtype=torch.float64)
        return cls(ancestors, torch.zeros(groups, dtype=torch.bool), ess)


class Outcome(NamedTuple):
    """What the final particles stand for.

    Args:
        log_weights: Log-weights, normalised in each group, shape (P, K), float64.
        log_evidence: Estimate of log E[exp(λ_r r)] over the model's own samples, shape (P,).
        reward_scale: λ_r of the target p(z) exp(λ_r r(z)), shape (P,).
    """

    log_weights: Tensor
    log_evidence: Tensor
    reward_scale: Tensor

    @classmethod
    def without_law(cls, rewards: Tensor) -> Outcome:
        """Return the outcome of a search: its particles are samples of no known law.

        The weights are uniform, evidence and scale NaN.
        """
        groups, particles = rewards.shape
        uniform = torch.full((groups, particles), -math.log(particles), dtype=torch.float64)
        unknown = torch.full((groups,), math.nan, dtype=torch.float64)
        return cls(uniform, unknown, unknown.clone())


class Strategy(Protocol[S]):
    """Decides at boundaries which particles go on, and at the end what they are worth.

    A strategy with an attribute `reward_scale` that is None, if it is a dataclass, is given that of
    the reward, or 1.
    """

    def due(self, at: Boundary) -> bool:
        """Return whether particles are to be scored at a boundary; the first is never scored."""
        ...

    def init(self, groups: int, particles: int) -> S:
        """Return the state of P groups of K particles, none of them scored.

        Raises:
            ValueError: if the strategy cannot do with that many particles.
        """
        ...

    def step(
        self, state: S, rewards: Tensor, at: Boundary, generators: Generators
    ) -> tuple[S, Decision]:
        """Decide which particles go on.

        Args:
            state: The state so far.
            rewards: Rewards of the denoised predictions, shape (P, K), float64, finite.
            at: The boundary.
            generators: A CPU generator for each group.
        """
        ...

    def finish(self, state: S, rewards: Tensor, total: int) -> Outcome:
        """Weigh the final particles.

        Args:
            state: The state so far.
            rewards: Rewards of the final samples, shape (P, K), float64, finite.
            total: Number of transitions of the run; 0 where it was stopped before the first.
        """
        ...
