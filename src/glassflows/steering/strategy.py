"""The protocol of a strategy: which particles go on, judged by their rewards alone.

A *group* is the K particles of one prompt; P groups run side by side and never mix. A particle
*lives* as long as it is worked on, and *rests* afterwards. A strategy is made of pure functions of
a state of its own: `init → step → … → finish`. It sees rewards of shape (P, K) and nothing else: no
latents, no images, no pipeline.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..scheduler.hooks import Boundary

_METHODS = ("due", "init", "step", "finish")

S = TypeVar("S")
Generators = list[torch.Generator]


class Decision(NamedTuple):
    """Which particles go on from a boundary.

    Args:
        ancestors: The slot in its own group that each slot goes on from, shape (P, K), int64.
        resampled: Whether a group's particles were moved, shape (P,), bool.
        ess: Effective sample size of each group before that, shape (P,), float64.
        worth: Rewards as the strategy counts them, higher for better, shape (P, K); None for the
            rewards themselves. The progress bar shows the best.
        alive: How many slots of each group go on, the first ones; None for all. The others rest to
            the end: no network, decoder or reward sees them, and later steps have rewards of shape
            (P, alive). Their ancestors may be any slots, such as their own.
    """

    ancestors: Tensor
    resampled: Tensor
    ess: Tensor
    worth: Tensor | None = None
    alive: int | None = None

    @classmethod
    def keep(cls, rewards: Tensor) -> Decision:
        """Return the decision by which every particle goes on."""
        groups, particles = rewards.shape
        device = rewards.device
        ancestors = torch.arange(particles, device=device).expand(groups, particles).clone()
        ess = torch.full((groups,), float(particles), dtype=torch.float64, device=device)
        return cls(ancestors, torch.zeros(groups, dtype=torch.bool, device=device), ess, rewards)


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
        particles = rewards.shape[1]
        uniform = torch.full_like(rewards, -math.log(particles), dtype=torch.float64)
        unknown = torch.full_like(uniform[:, 0], math.nan)
        return cls(uniform, unknown, unknown.clone())


class Strategy(Protocol[S]):
    """Decides at boundaries which particles go on, and at the end what they are worth.

    A strategy with an attribute `reward_scale` that is None, if it is a dataclass, is given that of
    the reward, or 1. A strategy with an attribute `moves` that is true means to move particles: a
    run in which it scored none warns.

    A strategy whose particles have a law, and that may be twisted (`Twist`), has two more methods:
    `scale(state, at)` returns λ_r as it counts at a boundary, shape (P, 1), and
    `reweigh(state, log_ratio)` the state in which the log-weights, shape (P, K), are larger by
    `log_ratio`. Without the first λ_r is that of the reward, or 1; without the second particles are
    twisted and not weighed for it.

    A population may shrink on the way: see `Decision.alive`. A strategy with an attribute `widths`,
    such as (16, 8, 4) or None, names the numbers of living particles beforehand: what cannot do
    with fewer, and more images than the last, are then refused at once. A strategy with a method
    `check_run(at)` is told the first boundary, and may refuse the run by a ValueError.
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
            rewards: Rewards of the denoised predictions of the K particles of each group that live
                (see `Decision.alive`), shape (P, K), float64, finite.
            at: The boundary. Where `at.stochastic` is false nothing random follows, and what is
                copied there stays a copy: FeynmanKac then weighs and moves nothing, and BeamSearch
                is not due.
            generators: A CPU generator for each group.
        """
        ...

    def finish(self, state: S, rewards: Tensor, total: int) -> Outcome:
        """Weigh the final particles.

        Args:
            state: The state so far.
            rewards: Rewards of the final samples of the K particles that live, shape (P, K),
                float64, finite.
            total: Number of transitions of the run; 0 where it was stopped before the first.
        """
        ...


def worth(rewards: Tensor, reward_scale: Tensor) -> Tensor:
    """Return rewards as the target p(z) exp(λ_r r(z)) counts them, higher for better.

    They are negated where λ_r is negative. A strategy of no known λ_r, NaN, follows the rewards.

    Args:
        rewards: Shape (…, P, K).
        reward_scale: λ_r of each group, shape (P,).
    """
    return torch.where(reward_scale[:, None] < 0, -rewards, rewards)


def looks_ahead(strategy: Strategy[Any], at: Boundary) -> bool:
    """Return whether particles look ahead at a boundary: fresh noise follows, and it is due."""
    return at.index > 0 and at.stochastic and strategy.due(at)


def check_strategy(strategy: Any) -> None:
    """Raise ValueError unless an object has the methods of a strategy."""
    if isinstance(strategy, type):
        name = strategy.__name__
        raise ValueError(f"strategy: expected an object, got the class {name}: write {name}()")
    missing = [name for name in _METHODS if not callable(getattr(strategy, name, None))]
    if len(missing) == len(_METHODS):
        raise ValueError(
            f"strategy: expected a strategy such as FeynmanKac(), got {strategy!r}: pass "
            "num_particles after it, or by name"
        )
    if missing:
        raise ValueError(
            f"strategy: expected the methods {', '.join(_METHODS)}, got {strategy!r} without "
            f"{', '.join(missing)}: see Strategy"
        )


def is_whole(value: Any) -> bool:
    """Return whether a value is an integer, of Python or numpy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_whole(name: str, value: Any) -> None:
    """Raise ValueError unless an option is a whole number, and at least 1."""
    if not is_whole(value):
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
