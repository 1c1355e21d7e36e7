"""FeynmanKac: the particle filter for p(z) exp(λ_r r(z)), and the scale λ_r of its rewards."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..scheduler.hooks import Boundary
from ..smc import filter as smc
from ..smc.potentials import Potential, potential_named
from ..smc.resampling import resampling_named
from ..smc.weights import normalise
from .strategy import Decision, Generators, Outcome

RewardScale = float | Literal["auto"] | Sequence[float] | Callable[[float], float]

AUTO_ESS = 0.5
"""Fraction of the particles that reward_scale="auto" leaves effective at the first scoring."""


@dataclass(frozen=True)
class FeynmanKacState:
    """What the filter needs at the next boundary.

    Args:
        filter: Weights and past rewards of the particles.
        chosen: λ_r that "auto" has chosen for each group, NaN before, shape (P, 1), float64.
        judged: Whether the scale has been held against rewards that differ.
    """

    filter: smc.FilterState
    chosen: Tensor
    judged: bool = False


@dataclass(frozen=True)
class FeynmanKac:
    """Sample p(z) exp(λ_r r(z)): weigh particles by rewards, resample when weights are uneven.

    With `ess_threshold=0` particles are never moved: this is best-of-K, with weights; with as many
    transitions as steps it is steering of the ancestral sampler.

    Args:
        reward_scale: λ_r; None takes `reward.reward_scale` where the reward has one, else 1. A list
            has one per transition, a function maps the fraction of transitions done, in (0, 1], to
            λ_r; the last one is that of the target. "auto" chooses for each prompt, at the first
            scoring whose rewards differ, the λ_r that leaves half of the particles effective, and
            keeps it: the target then depends on the draw; `result.reward_scale` tells.
        potential: How rewards on the way turn into weights: "difference", "max", "sum", or a
            function of the scaled rewards along each particle's ancestry, shape (S, P, K). The
            final weighing pays the rest: the log-potentials of a particle sum to λ_r r(final).
        resampling: "systematic", "stratified", "residual", "ssp" or "multinomial".
        ess_threshold: A group is resampled when its effective sample size falls below this fraction
            of K; 0 never resamples, 1 whenever weights differ.
        score_every: Score at every so many transitions.
        start: Score from this fraction of the transitions on.
        stop: Score up to this fraction of the transitions.

    Raises:
        ValueError: if an option is out of range.

    Reference:
        Singhal et al., arXiv:2501.06848; Holderrieth et al., arXiv:2509.25170, section 5.
    """

    reward_scale: RewardScale | None = None
    potential: str | Potential = "difference"
    resampling: str = "systematic"
    ess_threshold: float = 0.5
    score_every: int = 1
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if self.score_every < 1:
            raise ValueError(f"score_every: expected at least 1, got {self.score_every}")
        if not 0 <= self.ess_threshold <= 1:
            raise ValueError(
                "ess_threshold: expected a fraction of num_particles in [0, 1], got "
                f"{self.ess_threshold}"
            )
        if not 0 <= self.start <= self.stop <= 1:
            raise ValueError(
                f"start, stop: expected fractions 0 ≤ start ≤ stop ≤ 1, got {self.start}, "
                f"{self.stop}"
            )
        object.__setattr__(self, "reward_scale", _checked_scale(self.reward_scale))
        potential_named(self.potential)  # refuses unknown names, as does the next
        resampling_named(self.resampling)

    def due(self, at: Boundary) -> bool:
        done = at.index / at.total
        return self.start <= done <= self.stop and (at.index - 1) % self.score_every == 0

    def init(self, groups: int, particles: int) -> FeynmanKacState:
        nothing = torch.full((groups, 1), math.nan, dtype=torch.float64)
        return FeynmanKacState(smc.init(groups, particles), nothing)

    def step(
        self, state: FeynmanKacState, rewards: Tensor, at: Boundary, generators: Generators
    ) -> tuple[FeynmanKacState, Decision]:
        chosen = self._chosen(state.chosen, rewards)
        scale = self._scale(chosen, at.index, at.total)
        filtered, info = smc.step(
            state.filter,
            _scaled(scale, rewards),
            ess_threshold=self.ess_threshold,
            generators=generators,
            potential=self._potential,
            resampling=resampling_named(self.resampling),
        )
        judged = state.judged or self._judge(rewards, scale)
        decision = Decision(info.ancestors, info.resampled, info.ess)
        return FeynmanKacState(filtered, chosen, judged), decision

    def finish(self, state: FeynmanKacState, rewards: Tensor, total: int) -> Outcome:
        scale = self._scale(self._chosen(state.chosen, rewards), total, total)
        weighed = smc.finish(state.filter, _scaled(scale, rewards))
        evidence = smc.log_evidence(weighed)
        return Outcome(normalise(weighed.log_weights), evidence, scale[:, 0])

    # ---- the scale -------------------------------------------------------------------------------

    def _chosen(self, chosen: Tensor, rewards: Tensor) -> Tensor:
        """Return the scales of "auto", chosen where the rewards of a group first differ."""
        if self.reward_scale != "auto":
            return chosen
        found = smc.scale_for_ess(rewards, AUTO_ESS)[:, None]
        return torch.where(chosen.isnan(), found, chosen)

    def _scale(self, chosen: Tensor, index: int, total: int) -> Tensor:
        """Return λ_r of each group when `index` of `total` transitions are done, shape (P, 1)."""
        given: Any = 1.0 if self.reward_scale is None else self.reward_scale
        if isinstance(given, str):  # "auto"
            return chosen.nan_to_num(0.0)  # 0 as long as there is nothing to choose by
        if callable(given):
            given = given(index / total if total else 1.0)
        elif isinstance(given, tuple):
            if total and len(given) != total:
                raise ValueError(
                    f"reward_scale: expected one per transition, {total}, got a list of "
                    f"{len(given)}"
                )
            given = given[index - 1]
        return torch.full_like(chosen, float(given))

    def _judge(self, rewards: Tensor, scale: Tensor) -> bool:
        """Warn if the scale hardly tells particles apart; return whether their rewards differ."""
        if isinstance(self.reward_scale, str) or not (scale * rewards).diff().any():
            return False
        weights = rewards.shape[1] * normalise(scale * rewards).exp()
        furthest = float((weights - 1).abs().max())
        if furthest < 0.02:
            size = float(smc.scale_for_ess(rewards, AUTO_ESS).nanmedian())
            better = math.copysign(size, float(scale.max()))
            warnings.warn(
                f"reward_scale={float(scale.max()):g} leaves the weights within {furthest:.1%} of "
                f"uniform: steering does next to nothing. About {better:.3g} would leave half of "
                "the particles effective.",
                stacklevel=2,
            )
        return True

    def _potential(self, scaled: Tensor) -> Tensor:
        log_potential = torch.as_tensor(potential_named(self.potential)(scaled))
        if log_potential.shape != scaled.shape[1:] or not log_potential.isfinite().all():
            raise ValueError(
                f"potential returned {log_potential.tolist()}; expected finite values, one per "
                f"particle, of shape {tuple(scaled.shape[1:])}"
            )
        return log_potential


def _scaled(scale: Tensor, rewards: Tensor) -> Tensor:
    scaled = scale * rewards
    if not scaled.isfinite().all():
        raise ValueError(
            f"reward_scale={scale[:, 0].tolist()} times rewards {rewards.tolist()} is not finite; "
            "expected numbers: check what reward_scale returns"
        )
    return scaled


def _checked_scale(scale: Any) -> Any:
    """Return a reward scale as None, a float, a tuple of floats, a function or "auto"."""
    if scale is None or callable(scale) or (isinstance(scale, str) and scale == "auto"):
        return scale
    if isinstance(scale, str):
        raise ValueError(
            f'reward_scale: expected a number, a list, a function or "auto", got {scale!r}'
        )
    plain = scale.tolist() if isinstance(scale, (Tensor, np.ndarray, np.generic)) else scale
    is_list = isinstance(plain, (list, tuple))
    values = tuple(float(one) for one in (plain if is_list else [plain]))
    if not all(math.isfinite(one) for one in values):
        raise ValueError(f"reward_scale: expected finite numbers, got {scale!r}")
    return values if is_list else values[0]
