"""The population of a run: at each boundary it asks the scorer and the strategy who goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..caller import warn
from ..scheduler.hooks import Boundary, LookAhead, TransitionHook
from ..smc.resampling import systematic
from ..smc.weights import log_mean
from .arguments import Select
from .proposals import Twist, log_ratio, per_row
from .scorer import Scored, Scorer
from .strategy import Decision, Outcome, Strategy, is_whole, looks_ahead, worth
from .trajectory import Recorder


class Scoring(NamedTuple):
    """What happened where particles were scored.

    Args:
        transition: Number of the transition at whose start it was.
        rewards: Rewards of the denoised predictions, shape (P, W) of W that lived.
        decision: Which particles went on.
        preview: What the reward saw, (P · W, …), uint8; None unless asked for.
        parts: The scores that a composed reward is made of, shape (P, W) each.
    """

    transition: int
    rewards: Tensor
    decision: Decision
    preview: Tensor | None
    parts: dict[str, Tensor]


class Seen(NamedTuple):
    """One sample of each group.

    Args:
        worth: Rewards, higher for better, shape (P,).
        rewards: Shape (P,).
        latents: Shape (P, *event).
    """

    worth: Tensor
    rewards: Tensor
    latents: Tensor

    def or_better(self, other: Seen) -> Seen:
        """Return of each group the better of two."""
        better = other.worth > self.worth
        return Seen(
            *(
                torch.where(per_row(better, one).bool(), two, one)
                for one, two in zip(self, other, strict=True)
            )
        )


class Population(TransitionHook):
    """P groups of K particles under a strategy.

    Args:
        strategy: Decides which particles go on.
        scorer: Scores their denoised predictions.
        shape: (P, K).
        keep_previews: Whether what the reward saw is kept.
        show: Shows values on a progress bar.
        twist: Moves particles along the gradient of the reward; None for not.
        ahead: Excursions from each scoring, whose ends are scored instead; None for none.
        recorder: Writes transitions down; None for nobody.
        watch: Is told a boundary, what the reward saw there, the rewards (P, W) and what they are
            worth (P, W); None for nobody.

    Attributes:
        alive: How many particles of each group live, the first slots; the others rest to the end.
        scorings: What happened so far.
        best_seen: The best end of an excursion of each group so far; None before the first.
    """

    def __init__(
        self,
        strategy: Strategy[Any],
        scorer: Scorer,
        shape: tuple[int, int],
        keep_previews: bool,
        show: Callable[..., None],
        twist: Twist | None = None,
        ahead: LookAhead | None = None,
        recorder: Recorder | None = None,
        watch: Callable[[Boundary, Tensor, Tensor, Tensor], None] | None = None,
    ) -> None:
        self.strategy = strategy
        self.scorer = scorer
        self.shape = shape
        self.keep_previews = keep_previews
        self.show = show
        self.twist = twist
        self.ahead = ahead
        self.recorder = recorder
        self.watch = watch
        self.best_seen: Seen | None = None
        self._ends: list[Scored] = []
        self.alive = shape[1]
        self.scorings: list[Scoring] = []
        self._state = strategy.init(*shape)
        self._generators = [torch.Generator() for _ in range(shape[0])]
        self._total = 0
        self._dtype = torch.float32
        self._gradient: Tensor | None = None
        self._mean: Tensor | None = None

    def at_boundary(self, at: Boundary, x_t: Tensor, z: Tensor) -> Tensor | None:
        rows = self._rows_that_go_on(at, x_t, z)
        if self.recorder is not None:
            self.recorder.begin(at, x_t, z, rows)
        return rows

    def _rows_that_go_on(self, at: Boundary, x_t: Tensor, z: Tensor) -> Tensor | None:
        """Return the rows that go on from a boundary; None for all as they are."""
        self._total, self._dtype = at.total, x_t.dtype
        self._gradient = self._mean = None
        if at.index == 0:  # from pure noise every prediction is nearly E[z]: nothing to score yet
            if check_run := getattr(self.strategy, "check_run", None):
                check_run(at)
            return None
        if not self.strategy.due(at):
            return None
        scored = self._scored(at, self.of_living(z))
        preview, rewards = scored.preview, scored.rewards
        self._state, decision = self.strategy.step(self._state, rewards, at, self._generators)
        good = rewards if decision.worth is None else decision.worth
        if self.watch is not None and preview is not None:
            self.watch(at, preview, rewards, good)
        kept = preview if self.keep_previews else None
        self.scorings.append(Scoring(at.index, rewards, decision, kept, scored.parts or {}))
        best = good.argmax()
        self.show(
            reward=f"{float(rewards.flatten()[best]):.4g}", ess=f"{float(decision.ess.mean()):.1f}"
        )
        lived = self.alive
        self._shrink(decision.alive)
        if self.alive == lived and not decision.resampled.any():
            return None
        ancestors = decision.ancestors[:, : self.alive]
        if self._gradient is not None:
            rows = self.rows(ancestors, lived)
            self._gradient = self._gradient[rows.to(self._gradient.device)]
        copies = torch.arange(self.shape[1], device=ancestors.device) % self.alive
        return self.rows(ancestors[:, copies])  # those that rest are copies of the living

    def _shrink(self, alive: int | None) -> None:
        """Let the first particles of each group live on, all for None."""
        if alive is None or alive == self.alive:
            return
        if not (is_whole(alive) and 1 <= alive <= self.alive):
            raise ValueError(
                f"alive: expected 1 to {self.alive}, the particles of a prompt that lived, got "
                f"{alive!r} from {self.strategy!r}: return Decision(..., alive=None) for all"
            )
        self.alive = int(alive)
        self.scorer.shrink(self.alive)

    def living(self) -> Tensor | None:
        if self.alive == self.shape[1]:
            return None
        return self.rows(torch.arange(self.alive, device="cpu"))

    def of_living(self, rows: Tensor) -> Tensor:
        """Return the rows of particles that live, of a tensor (P · K, …)."""
        living = self.living()
        return rows if living is None else rows[living.to(rows.device)]

    def _scored(self, at: Boundary, z: Tensor) -> Scored:
        """Return the rewards of denoised predictions, shown as the reward sees them where wanted.

        Their gradients are taken on the way where they are needed. Where excursions have come back,
        the rewards are those of their ends, and parts of a reward are means over these.
        """
        if self._ends:
            ends, self._ends = self._ends, []
            value = log_mean_exp(torch.stack([end.rewards for end in ends]), self._target(at))
            parts = {
                name: torch.stack([(end.parts or {})[name] for end in ends]).mean(0)
                for name in ends[0].parts or ()
            }
            return ends[0]._replace(rewards=value, parts=parts)
        if self.twist is None or not at.stochastic:
            scored = self.scorer.scored(z.to(self._dtype, copy=True), self._shows)
        else:
            scored = self.scorer.graded(z, self._dtype, self._shows)
        self._gradient = scored.gradients
        return scored

    @property
    def _shows(self) -> bool:
        """Whether what the reward sees is kept or shown."""
        return self.keep_previews or self.watch is not None

    def look_ahead(self, at: Boundary) -> LookAhead | None:
        return self.ahead if self.ahead and looks_ahead(self.strategy, at) else None

    def arrived(self, at: Boundary, z: Tensor) -> None:
        latents = self.of_living(z).to(self._dtype, copy=True)
        scored = self.scorer.scored(latents.clone(), self._shows)  # a decoder may write into them
        rewards = scored.rewards
        self._ends.append(scored if not self._ends else scored._replace(preview=None))
        good = worth(rewards, self._target(at)[:, 0])
        rows = self.rows(good.argmax(1, keepdim=True), self.alive)
        seen = Seen(good.amax(1), rewards.flatten()[rows], latents[rows.to(latents.device)])
        self.best_seen = seen if self.best_seen is None else self.best_seen.or_better(seen)

    def shift(self, at: Boundary, z: Tensor) -> Tensor | None:
        if self.twist is None or at.index == 0:  # from pure noise the gradient is that of E[z]
            return None
        gradient = self._gradient
        if gradient is None:  # no scoring was due
            gradient = self.scorer.graded(self.of_living(z), self._dtype).gradients
        scale = self._scale(at).expand(-1, self.alive).flatten()
        self._mean = self.twist.mean(gradient, scale, at)  # type: ignore[arg-type]
        living = self.living()
        if living is None:
            return self._mean
        return torch.zeros_like(z).index_copy(0, living.to(z.device), self._mean)

    def drew(self, at: Boundary, noise: Tensor) -> None:
        reweigh = getattr(self.strategy, "reweigh", None)
        if self._mean is not None and reweigh is not None:
            ratio = log_ratio(self._mean, self.of_living(noise)).view(-1, self.alive)
            self._state = reweigh(self._state, ratio)
        if self.recorder is not None:
            self.recorder.drew(at, noise)

    def _scale(self, at: Boundary) -> Tensor:
        """Return λ_r as it counts at a boundary, shape (P, 1)."""
        known = getattr(self.strategy, "scale", None)
        if known is not None:
            return known(self._state, at)
        scale = getattr(self.scorer.reward, "reward_scale", None)
        scale = 1.0 if scale is None else float(scale)
        return torch.full((self.shape[0], 1), scale, dtype=torch.float64, device="cpu")

    def _target(self, at: Boundary) -> Tensor:
        """Return λ_r of the target as far as a boundary knows it, shape (P, 1)."""
        return self._scale(replace(at, index=at.total))

    def begins(self, seeds: list[int]) -> None:
        """Seed the generator of each group by its first particle, on all processes alike."""
        self.scorer.team.agree({"initial latents": seeds})
        first = seeds[:: self.shape[1]]
        for generator, seed in zip(self._generators, first, strict=True):
            generator.manual_seed(seed)

    def rows(self, slots: Tensor, particles: int | None = None) -> Tensor:
        """Return the rows of slots, which are numbered within their group; shape (P, …) → (…,).

        Args:
            slots: Shape (P, …), or that of one group for all alike.
            particles: Number of rows of each group; None for K.
        """
        groups, particles = self.shape[0], particles or self.shape[1]
        return (torch.arange(groups, device=slots.device)[:, None] * particles + slots).flatten()

    def finish(self, rewards: Tensor, interrupted: bool) -> Outcome:
        """Weigh the final particles that live by their rewards, shape (P, W)."""
        if getattr(self.strategy, "moves", False) and not (self.scorings or interrupted):
            warn(
                f"{self.strategy!r} scored no particles on the way, and moved none: of "
                f"{self._total} transition(s) none after the first begins where it is due. Take "
                "more transitions, more steps or a wider window, or BestOfN() for the end alone."
            )
        return self.strategy.finish(self._state, rewards, self._total)

    def history(self) -> dict[str, Any]:
        """Return the fields of a result that tell of the scorings on the way."""
        none = torch.empty(0, *self.shape, dtype=torch.float64, device="cpu")
        decisions = [one.decision for one in self.scorings]
        scored = [self._padded(one.rewards, math.nan) for one in self.scorings]
        ancestors = [self._padded(one.ancestors[:, : one.alive], -1) for one in decisions]
        previews = [
            self._padded(one.preview.unflatten(0, one.rewards.shape), 0).flatten(0, 1)
            for one in self.scorings
            if one.preview is not None
        ]
        return {
            "transitions": tuple(one.transition for one in self.scorings),
            "scored": _stacked(scored, none),
            "ancestors": _stacked(ancestors, none.long()),
            "resampled": _stacked([one.resampled for one in decisions], none[..., 0].bool()),
            "ess": _stacked([one.ess.double() for one in decisions], none[..., 0]),
            "previews": torch.stack(previews) if previews else None,
        }

    def parts(self, final: Scored) -> dict[str, Tensor]:
        """Return the scores that a composed reward is made of, shape (S + 1, P, K) each.

        Args:
            final: The scores of the final samples, which come last.
        """
        every = [*(one.parts for one in self.scorings), final.parts or {}]
        return {
            name: torch.stack([self._padded(one[name], math.nan) for one in every])
            for name in every[-1]
        }

    def _padded(self, values: Tensor, value: float) -> Tensor:
        """Return values of living particles, shape (P, W, …), with another one of K − W at rest."""
        groups, living, *event = values.shape
        resting = values.new_full((groups, self.shape[1] - living, *event), value)
        return torch.cat([values, resting], 1)

    def order(self, select: Select, rewards: Tensor, outcome: Outcome, number: int) -> Tensor:
        """Return the slots of the samples that are returned of each group, shape (P, number).

        Args:
            select: The best for the target first, or drawn by the weights for "sample".
            rewards: Final rewards, shape (P, W).
            outcome: What `finish` returned.
            number: How many of each.
        """
        if number > self.alive:
            raise ValueError(
                f"num_images_per_prompt: expected 1 to {self.alive}, the particles of a prompt "
                f"that lived to the end, got {number}: ask for fewer"
            )
        if select != "sample":
            good = worth(rewards, outcome.reward_scale)
            return good.argsort(dim=-1, descending=True, stable=True)[:, :number]
        groups = zip(outcome.log_weights.split(1), self._generators, strict=True)
        return torch.cat([drawn_slots(group, generator, number) for group, generator in groups])


def _stacked(tensors: list[Tensor], empty: Tensor) -> Tensor:
    return torch.stack(tensors) if tensors else empty


def log_mean_exp(ends: Tensor, scale: Tensor) -> Tensor:
    """Return V̂/λ = log (1/S Σ_s exp(λ r(z_s))) / λ, the reward that stands for S draws of z.

    It is the mean where λ is 0.

    Args:
        ends: Rewards of the draws, shape (S, P, K), float64.
        scale: λ of each group, shape (P, 1).
    """
    value = log_mean((scale * ends).movedim(0, -1))
    return torch.where(scale == 0, ends.mean(0), value / torch.where(scale == 0, 1.0, scale))


def drawn_slots(log_weights: Tensor, generator: torch.Generator, number: int) -> Tensor:
    """Return `number` slots drawn in proportion to their weights, shape (1, number)."""
    slots = systematic(log_weights, [generator])
    keep = torch.randperm(slots.shape[-1], generator=generator)[:number]
    return slots[:, keep]
