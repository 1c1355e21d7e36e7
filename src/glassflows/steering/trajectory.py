"""Transitions of one network call, which are Gaussian: what policy-gradient trainers need of them.

Such a transition draws x_t′ from N(γ̄ x_t + ᾱ ẑ, σ̄² I). Flow-GRPO and DDPO raise or lower its
log-density by the reward of the final image. A transition of several calls is sampled by an ODE,
and its density is not known.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..flow.transition import Transition
from ..scheduler.hooks import Boundary


class Trajectories(NamedTuple):
    """The Gaussian transitions that N particles took, T of each, from noise to data.

    They are those of the particles' ancestors where particles were resampled. Transitions whose
    fresh noise does not matter have no density, and are not among them: the first of a run, which
    is the ODE's unless `first_transition="posterior"`, and a last one that ends in ẑ.

    Args:
        x_t: The pipeline's latents there, in its dtype, shape (T, N, *event).
        x_next: What was drawn, float32, same shape.
        mean: γ̄ x_t + ᾱ ẑ, float32, same shape.
        std: σ̄ of each transition, shape (T,), float64.
        gamma: γ̄, weight of x_t in the mean, shape (T,), float64.
        alpha: ᾱ, weight of ẑ in the mean, shape (T,), float64.
        steps: Index of each one's network call in `scheduler.timesteps`, shape (T,), int64.
        timesteps: What the network was told, shape (T,), float64.
    """

    x_t: Tensor
    x_next: Tensor
    mean: Tensor
    std: Tensor
    gamma: Tensor
    alpha: Tensor
    steps: Tensor
    timesteps: Tensor

    @property
    def log_prob(self) -> Tensor:
        """log N(x_next; mean, std² I) under the network that drew it, shape (T, N), float64.

        It is the sum over the entries of a sample; DDPO and Flow-GRPO divide it by their number.
        A twist moves what is drawn, and not this density.
        """
        return torch.stack([self._log_normal(i, mean) for i, mean in enumerate(self.mean)])

    def log_prob_of(self, i: int, denoised: Tensor) -> Tensor:
        """Return the log-density of transition i under another network, shape (N,), float64.

            log N(x_next; γ̄ x_t + ᾱ ẑ, σ̄² I)

        Gradients flow into ẑ.

        Args:
            i: Which of the T transitions.
            denoised: ẑ of `x_t[i]` by that network, best in float32: for a velocity v of flow
                matching x_t − σ v, σ = timestep / 1000.
        """
        x_t, z = self.x_t[i].to(denoised.device).float(), denoised
        z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
        return self._log_normal(i, float(self.gamma[i]) * x_t + float(self.alpha[i]) * z)

    def _log_normal(self, i: int, mean: Tensor) -> Tensor:
        std = float(self.std[i])
        dtype = torch.float32 if mean.device.type == "mps" else torch.float64
        noise = (self.x_next[i].to(mean.device, dtype) - mean.to(dtype)).flatten(1) / std
        constant = math.log(std) + math.log(2 * math.pi) / 2
        return -0.5 * noise.square().sum(1) - noise.shape[1] * constant


class _Step(NamedTuple):
    """A transition of all particles, its coefficients and where it began."""

    at: Boundary
    chosen: Transition
    x_t: Tensor
    x_next: Tensor
    mean: Tensor


class Recorder:
    """Writes down the transitions of a run."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._state: tuple[Tensor, Tensor] | None = None

    def begin(self, at: Boundary, x_t: Tensor, z: Tensor, rows: Tensor | None) -> None:
        """Take note of the particles at a boundary.

        Args:
            at: The boundary.
            x_t: Their states, shape (N, *event).
            z: Their denoised predictions, float32, in the units of `at.data_scale`.
            rows: Those that go on; None for all.

        Raises:
            ValueError: if a transition of the run has several network calls.
        """
        if at.index == 0 and at.total != at.num_calls:
            raise ValueError(
                "record: expected transitions of one network call each, which are Gaussian, got "
                f"{at.total} transition(s) of {at.num_calls} calls. Those of several calls are "
                "sampled by an ODE and have no Gaussian density. Set "
                f"num_transitions={at.num_calls}; or leave record out and train by a method that "
                "needs no density: by weight or by reward, by DiffusionNFT, or by DPO on pairs "
                "(result.samples(), Rollouts)"
            )
        everyone = torch.arange(len(x_t), device=x_t.device)
        rows = everyone if rows is None else rows.to(x_t.device)
        self._state = x_t[rows], z[rows] / at.data_scale

    def drew(self, at: Boundary, noise: Tensor) -> None:
        """Take note of the fresh noise of the transition that begins at a boundary."""
        if self._state is None or at.transition is None:
            return
        (x_t, z), chosen, self._state = self._state, at.transition, None
        mean = chosen.gamma * x_t.float() + chosen.alpha * z
        x_next = mean + chosen.sigma * noise
        self._steps.append(_Step(at, chosen, x_t.cpu(), x_next.cpu(), mean.cpu()))

    def trajectories(
        self,
        slots: Tensor,
        ancestors: Tensor,
        transitions: tuple[int, ...],
        timesteps: Tensor,
    ) -> Trajectories:
        """Return the transitions that final particles and their ancestors took.

        Args:
            slots: Final slots of each group, shape (P, n).
            ancestors: Parent slots at each scoring, shape (S, P, K).
            transitions: At the start of which transition each scoring took place, length S.
            timesteps: What the network was told at each call.

        Raises:
            ValueError: if no transition drew noise.
        """
        if not self._steps:
            raise ValueError(
                "record: expected a transition that draws noise, got none: the first is the ODE's, "
                "the last may end in the prediction itself, and correlations of 1 draw none: take "
                "3 network calls or more"
            )
        rows: list[Tensor] = []
        scorings = list(zip(transitions, ancestors, strict=True))
        first = torch.arange(len(slots), device="cpu")[:, None] * ancestors.shape[-1]
        for step in reversed(self._steps):
            while scorings and scorings[-1][0] > step.at.index:
                slots = scorings.pop()[1].gather(1, slots)
            rows.insert(0, (first + slots).flatten())

        def taken(name: str) -> Tensor:
            pairs = zip(self._steps, rows, strict=True)
            return torch.stack([getattr(step, name)[row] for step, row in pairs])

        def coefficients(name: str) -> Tensor:
            values = [getattr(step.chosen, name) for step in self._steps]
            return torch.tensor(values, dtype=torch.float64, device="cpu")

        steps = torch.tensor([step.at.step for step in self._steps], device="cpu")
        return Trajectories(
            taken("x_t"),
            taken("x_next"),
            taken("mean"),
            std=coefficients("sigma"),
            gamma=coefficients("gamma"),
            alpha=coefficients("alpha"),
            steps=steps,
            timesteps=timesteps.cpu().double()[steps],
        )
