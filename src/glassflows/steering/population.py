"""The population of a run: at each boundary it asks the scorer and the strategy who goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..scheduler.hooks import Boundary, TransitionHook
from ..smc.resampling import systematic
from .caller import warn
from .proposals import Twist, log_ratio
from .scorer import Scorer
from .strategy import Decision, Outcome, Strategy, worth

Select = Literal["all", "best", "sample"]


class Scoring(NamedTuple):
    """What happened where particles were scored.

    Args:
        transition: Number of the transition at whose start it was.
        rewards: Rewards of the denoised predictions, shape (P, K).
        decision: Which particles went on.
        preview: What the reward saw, (P · K, …), uint8; None unless asked for.
    """

    transition: int
    rewards: Tensor
    decision: Decision
    preview: Tensor | None


class Population(TransitionHook):
    """P groups of K particles under a strategy.

    Args:
        strategy: Decides which particles go on.
        scorer: Scores their denoised predictions.
        shape: (P, K).
        keep_previews: Whether what the reward saw is kept.
        show: Shows values on a progress bar.
        twist: Moves particles along the gradient of the reward; None for not.

    Attributes:
        scorings: What happened so far.
    """

    def __init__(
        self,
        strategy: Strategy[Any],
        scorer: Scorer,
        shape: tuple[int, int],
        keep_previews: bool,
        show: Callable[..., None],
        twist: Twist | None = None,
    ) -> None:
        self.strategy = strategy
        self.scorer = scorer
        self.shape = shape
        self.keep_previews = keep_previews
        self.show = show
        self.twist = twist
        self.scorings: list[Scoring] = []
        self._state = strategy.init(*shape)
        self._generators = [torch.Generator() for _ in range(shape[0])]
        self._total = 0
        self._dtype = torch.float32
        self._gradient: Tensor | None = None
        self._mean: Tensor | None = None

    def at_boundary(self, at: Boundary, x_t: Tensor, z: Tensor) -> Tensor | None:
        self._total, self._dtype = at.total, x_t.dtype
        self._gradient = self._mean = None
        if at.index == 0:  # from pure noise every prediction is nearly E[z]: nothing to score yet
            return None
        if not self.strategy.due(at):
            return None
        preview, rewards = self._scored(at, z)
        self._state, decision = self.strategy.step(self._state, rewards, at, self._generators)
        self.scorings.append(Scoring(at.index, rewards, decision, preview))
        best = (rewards if decision.worth is None else decision.worth).argmax()
        self.show(
            reward=f"{float(rewards.flatten()[best]):.4g}", ess=f"{float(decision.ess.mean()):.1f}"
        )
        if not decision.resampled.any():
            return None
        rows = self.rows(decision.ancestors)
        if self._gradient is not None:
            self._gradient = self._gradient[rows.to(self._gradient.device)]
        return rows

    def _scored(self, at: Boundary, z: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return what is kept of denoised predictions as the reward sees them, and their rewards.

        Their gradients are taken on the way where they are needed.
        """
        if self.twist is None or not at.stochastic:
            samples = self.scorer.decoded(z.to(self._dtype, copy=True))
            # the reward may write into what it gets
            preview = self.scorer.preview(samples) if self.keep_previews else None
            return preview, self.scorer.score(samples)
        samples, rewards, self._gradient = self.scorer.graded(z, self._dtype)
        return self.scorer.preview(samples) if self.keep_previews else None, rewards

    def shift(self, at: Boundary, z: Tensor) -> Tensor | None:
        if self.twist is None or at.index == 0:  # from pure noise the gradient is that of E[z]
            return None
        if self._gradient is None:  # no scoring was due
            self._gradient = self.scorer.graded(z, self._dtype).gradients
        scale = self._scale(at).expand(self.shape).flatten()
        self._mean = self.twist.mean(self._gradient, scale, at)
        return self._mean

    def drew(self, at: Boundary, noise: Tensor) -> None:
        reweigh = getattr(self.strategy, "reweigh", None)
        if self._mean is not None and reweigh is not None:
            ratio = log_ratio(self._mean, noise).view(self.shape)
            self._state = reweigh(self._state, ratio)

    def _scale(self, at: Boundary) -> Tensor:
        """Return λ_r as it counts at a boundary, shape (P, 1)."""
        known = getattr(self.strategy, "scale", None)
        if known is not None:
            return known(self._state, at)
        scale = getattr(self.scorer.reward, "reward_scale", 1.0)
        return torch.full((self.shape[0], 1), scale, dtype=torch.float64, device="cpu")

    def begins(self, seeds: list[int]) -> None:
        """Seed the generator of each group by its first particle."""
        first = seeds[:: self.shape[1]]
        for generator, seed in zip(self._generators, first, strict=True):
            generator.manual_seed(seed)

    def rows(self, slots: Tensor) -> Tensor:
        """Return the rows of slots, which are numbered within their group; shape (P, …) → (…,)."""
        groups, particles = self.shape
        return (torch.arange(groups, device=slots.device)[:, None] * particles + slots).flatten()

    def finish(self, rewards: Tensor, interrupted: bool) -> Outcome:
        """Weigh the final particles by their rewards, shape (P, K)."""
        if getattr(self.strategy, "moves", False) and not (self.scorings or interrupted):
            warn(
                f"{self.strategy!r} scored no particles on the way, and moved none: of "
                f"{self._total} transition(s) none after the first begins where it is due. Take "
                "more transitions, more steps or a wider window, or BestOfN() for the end alone."
            )
        return self.strategy.finish(self._state, rewards, self._total)

    def order(self, select: Select, rewards: Tensor, outcome: Outcome, number: int) -> Tensor:
        """Return the slots of the samples that are returned of each group, shape (P, number).

        Args:
            select: The best for the target first, or drawn by the weights for "sample".
            rewards: Final rewards, shape (P, K).
            outcome: What `finish` returned.
            number: How many of each.
        """
        if select != "sample":
            good = worth(rewards, outcome.reward_scale)
            return good.argsort(dim=-1, descending=True, stable=True)[:, :number]
        groups = zip(outcome.log_weights.split(1), self._generators, strict=True)
        return torch.cat([drawn_slots(group, generator, number) for group, generator in groups])


def drawn_slots(log_weights: Tensor, generator: torch.Generator, number: int) -> Tensor:
    """Return `number` slots drawn in proportion to their weights, shape (1, number)."""
    slots = systematic(log_weights, [generator])
    keep = torch.randperm(slots.shape[-1], generator=generator)[:number]
    return slots[:, keep]
