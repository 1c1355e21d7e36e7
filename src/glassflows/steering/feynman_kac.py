"""FeynmanKac: the particle filter for p(z) exp(λ_r r(z)), and the scale λ_r of its rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..caller import warn
from ..scheduler.hooks import Boundary
from ..signatures import described
from ..smc import filter as smc
from ..smc.potentials import Potential, potential_named
from ..smc.resampling import resampling_named
from ..smc.weights import normalise
from .calibration import Calibration
from .strategy import Decision, Generators, Outcome, check_whole, worth
from .widths import check_enough, check_first, checked_widths, new_width, num_stochastic

RewardScale = float | Literal["auto"] | Sequence[float] | Callable[[float], float]

AUTO_ESS = 0.5
"""Fraction of the particles that reward_scale="auto" leaves effective at the first scoring."""

_FLAT = 0.02
"""Share of 1/K by which some weight has to differ from 1/K, or all are as good as the same."""

_COLLAPSED = 1.02
"""Effective sample size below which one particle has all the weight but a hundredth."""


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


@dataclass(frozen=True, repr=False)
class FeynmanKac:
    """Sample p(z) exp(λ_r r(z)): weigh particles by rewards, resample when weights are uneven.

    With `ess_threshold=0` particles are never moved: this is best-of-K, with weights; with as many
    transitions as steps it is steering of the ancestral sampler. Where nothing random follows, at
    the start of a last transition of one network call, particles are weighed and not moved: copies
    would stay copies.

    With `widths` the population shrinks, 16 → 8 → 4. The transitions are split into as many parts
    as there are widths, as evenly as possible, the first ones longer; one that nothing random
    follows belongs to the last part. At the start of part j > 0 every group is weighed and
    resampled to `widths[j]` particles of equal weights, whatever the window and the threshold. The
    estimate of the evidence stays unbiased.

    Args:
        reward_scale: λ_r; None takes `reward.reward_scale` where the reward has one, else 1. A list
            has one per transition, a function maps the fraction of transitions done, in (0, 1], to
            λ_r; the last one is that of the target. "auto" chooses for each prompt, at the first
            scoring whose rewards differ, the λ_r that leaves half of the particles effective, and
            keeps it: the target then depends on the draw; `result.reward_scale` tells. Of a
            negative λ_r the best particle is that of the lowest reward.
        potential: How rewards on the way turn into weights: "difference", "max", "sum", or a
            function of the scaled rewards along each particle's ancestry, shape (S, P, K). The
            final weighing pays the rest: the log-potentials of a particle sum to λ_r r(final).
        resampling: "systematic", "stratified", "residual", "ssp" or "multinomial".
        ess_threshold: A group is resampled when its effective sample size falls below this fraction
            of K, or of the particles that live; 0 never resamples, 1 whenever weights differ.
        score_every: Score at every so many transitions.
        start: Score from this fraction of the transitions on. None is 0 with a calibration, which
            knows what early rewards are worth; without one it is 0.5, since the rewards of early
            predictions hardly tell of the final ones.
        stop: Score up to this fraction of the transitions.
        calibration: How much rewards on the way tell of the final one; None for as much as it.
            λ_r, a number, is then that of the target, and b_k λ_r that of boundary k. A run of
            other transitions or network calls than the calibration's is refused.
        widths: How many particles of each prompt live in each part of the run; the first is K, and
            none is larger than the one before it. None for K to the end.

    Raises:
        ValueError: if an option is out of range, or widths do not begin with K or are too many for
            the transitions of a run.

    Reference:
        Singhal et al., arXiv:2501.06848; Holderrieth et al., arXiv:2509.25170, section 5.
    """

    reward_scale: RewardScale | None = None
    potential: str | Potential = "difference"
    resampling: str = "systematic"
    ess_threshold: float = 0.5
    score_every: int = 1
    start: float | None = None
    stop: float = 1.0
    calibration: Calibration | None = None
    widths: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_whole("score_every", self.score_every)
        if not (isinstance(self.ess_threshold, Real) and 0 <= self.ess_threshold <= 1):
            raise ValueError(
                "ess_threshold: expected a fraction of num_particles in [0, 1], got "
                f"{self.ess_threshold!r}"
            )
        numbers = isinstance(self.start, Real | None) and isinstance(self.stop, Real)
        if not (numbers and 0 <= (self.start or 0) <= self.stop <= 1):
            raise ValueError(
                f"start, stop: expected fractions 0 ≤ start ≤ stop ≤ 1, got {self.start!r}, "
                f"{self.stop!r}"
            )
        object.__setattr__(self, "reward_scale", _checked_scale(self.reward_scale))
        if not (self.calibration is None or isinstance(self.calibration, Calibration)):
            raise ValueError(
                f"calibration: expected a Calibration or None, got {self.calibration!r}: "
                "steerer.calibrate(prompts) makes one, and Calibration.load(path) reads one"
            )
        if self.calibration is not None:
            check_calibrates(self.reward_scale, f"{self.calibration.reward_scale:.3g}")
        if self.widths is not None:
            object.__setattr__(self, "widths", checked_widths(self.widths))
        potential_named(self.potential)  # refuses unknown names, as does the next
        resampling_named(self.resampling)

    def __repr__(self) -> str:
        return described(self)

    @property
    def moves(self) -> bool:
        """Whether particles are to be moved on the way; from `start=1` on there is no way left."""
        shrinks = self.widths is not None and len(self.widths) > 1
        return shrinks or (self.ess_threshold > 0 and self._start < 1)

    @property
    def _start(self) -> float:
        """The fraction of the transitions from which on particles are scored."""
        if self.start is not None:
            return self.start
        return 0.0 if self.calibration is not None else min(0.5, self.stop)

    def check_run(self, at: Boundary) -> None:
        """Refuse a run of fewer transitions than widths, or of others than were calibrated."""
        if self.calibration is not None:
            self.calibration.check_run(at)
        if self.widths is not None:
            check_enough(
                self.widths, num_stochastic(at), " at whose start fresh noise still matters"
            )

    def due(self, at: Boundary) -> bool:
        done = at.index / at.total
        in_window = self._start <= done <= self.stop and (at.index - 1) % self.score_every == 0
        return in_window or self.width_at(at) is not None

    def init(self, groups: int, particles: int) -> FeynmanKacState:
        if self.widths is not None:
            check_first(self.widths, particles)
        nothing = torch.full((groups, 1), math.nan, dtype=torch.float64, device="cpu")
        return FeynmanKacState(smc.init(groups, particles), nothing)

    def step(
        self, state: FeynmanKacState, rewards: Tensor, at: Boundary, generators: Generators
    ) -> tuple[FeynmanKacState, Decision]:
        if self.calibration is not None:
            self.calibration.check_run(at)
        chosen = self._chosen(state.chosen, rewards)
        scale, target = (self._scale(chosen, done, at.total) for done in (at.index, at.total))
        width = self.width_at(at)
        filtered, info = smc.step(
            state.filter,
            _scaled(scale, rewards),
            ess_threshold=self.ess_threshold if at.stochastic else 0.0,
            generators=generators,
            potential=self._potential,
            resampling=resampling_named(self.resampling),
            number=width,
        )
        judged = state.judged or self._judge(rewards, scale, target, info)
        resting = Decision.keep(rewards).ancestors[:, info.ancestors.shape[1] :]
        ancestors = torch.cat([info.ancestors, resting], 1)
        good = worth(rewards, target[:, 0])
        decision = Decision(ancestors, info.resampled, info.ess, good, width)
        return FeynmanKacState(filtered, chosen, judged), decision

    def scale(self, state: FeynmanKacState, at: Boundary) -> Tensor:
        """Return λ_r as it counts at a boundary, shape (P, 1); 0 where "auto" has not chosen."""
        return self._scale(state.chosen, at.index, at.total)

    def reweigh(self, state: FeynmanKacState, log_ratio: Tensor) -> FeynmanKacState:
        """Return the state of particles whose log-weights are larger by `log_ratio`, (P, K)."""
        return replace(state, filter=smc.reweigh(state.filter, log_ratio))

    def finish(self, state: FeynmanKacState, rewards: Tensor, total: int) -> Outcome:
        scale = self._scale(self._chosen(state.chosen, rewards), total, total)
        weighed = smc.finish(state.filter, _scaled(scale, rewards))
        evidence = smc.log_evidence(weighed)
        return Outcome(normalise(weighed.log_weights), evidence, scale[:, 0])

    def width_at(self, at: Boundary) -> int | None:
        """Return the width to shrink to at a boundary; None where no part begins."""
        if self.widths is None or not at.stochastic:
            return None
        return new_width(self.widths, at.index, num_stochastic(at))

    # ---- the scale -------------------------------------------------------------------------------

    def _chosen(self, chosen: Tensor, rewards: Tensor) -> Tensor:
        """Return the scales of "auto", chosen where the rewards of a group first differ."""
        if self.reward_scale != "auto":
            return chosen
        found = torch.where(chosen.isnan(), smc.scale_for_ess(rewards, AUTO_ESS)[:, None], chosen)
        if ((found == 0) | found.isinf()).any():
            raise ValueError(
                'reward_scale="auto": expected rewards with differences between 1e-290 and 1e308, '
                f"got {rewards.tolist()}: scale the reward, or give a number"
            )
        return found

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
        elif self.calibration is not None and index < total:
            given = self.calibration.schedule(given)[index - 1]  # b_k λ on the way, λ at the end
        return torch.full_like(chosen, float(given))

    def _judge(self, rewards: Tensor, scale: Tensor, target: Tensor, info: smc.FilterInfo) -> bool:
        """Warn of weights that are all the same, or all one's; return whether rewards differ.

        Weights are to differ at the scale of the target, since a schedule may well begin small.

        Args:
            rewards: Shape (P, K).
            scale: λ_r of this scoring, shape (P, 1).
            target: λ_r of the target, shape (P, 1).
            info: What happened at this scoring.
        """
        scaled = _scaled(target, rewards)
        differ = scaled.amax(-1) > scaled.amin(-1)
        if self.reward_scale == "auto" or not differ.any():
            return False
        number = rewards.shape[1]
        furthest = float((number * normalise(scaled).exp() - 1).abs().max())
        size = float(smc.scale_for_ess(rewards[differ], AUTO_ESS).median())
        better = math.copysign(size, float(target.max()))
        advice = "About {:.3g} would leave half of the particles effective."
        if furthest < _FLAT:
            warn(
                f"reward_scale={float(target.max()):g} leaves the weights within {furthest:.1%} of "
                f"uniform: steering does next to nothing. {advice.format(better)}"
            )
        collapsed = (info.ess < _COLLAPSED) & info.resampled
        if number > 2 and collapsed[differ].double().mean() > 0.5:  # of two particles half is one
            here = float(scale.max())
            share = 1.0 if self.calibration is None else here / float(target.max())  # b_k
            warn(
                f"reward_scale={here / share:g} leaves one of {number} particles nearly all the "
                "weight at the first scoring: the others are lost. " + advice.format(better / share)
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


def check_calibrates(scale: RewardScale | None, proposal: str) -> None:
    """Raise ValueError unless a reward scale goes with a calibration.

    Args:
        scale: The reward scale, checked.
        proposal: What to take for it.
    """
    if not (scale is None or isinstance(scale, Real)):
        raise ValueError(
            "reward_scale: expected a number together with a calibration, since the calibration is "
            f"the schedule and the number its last value, got {scale!r}: give a number, "
            f"reward_scale={proposal} for half of the final particles effective"
        )


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
    plain = scale.tolist() if isinstance(scale, (Tensor, np.ndarray, np.generic)) else scale
    is_list = isinstance(plain, (list, tuple))
    numbers = list(plain) if is_list else [plain]
    if not numbers or not all(isinstance(one, Real) for one in numbers):
        raise ValueError(
            f'reward_scale: expected a number, a list, a function or "auto", got {scale!r}'
        )
    values = tuple(float(one) for one in numbers)
    if not all(math.isfinite(one) for one in values):
        raise ValueError(f"reward_scale: expected finite numbers, got {scale!r}")
    return values if is_list else values[0]
