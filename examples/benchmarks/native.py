"""Feynman-Kac steering around diffusers' own stochastic schedulers: baselines for the library's transitions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from glassflows.smc import filter as smc
from scenes import decoded
from scenes.methods import Method, Population, Spending, plain


class EulerMaruyama(FlowMatchEulerDiscreteScheduler):
    """Euler-Maruyama for dx = (u + η s) dt + √(2η) dw in σ = 1 − t, whose exact transitions are DDPM's.

    η = σ / (1 − σ) is infinite at σ = 1: the first step and the last are the ODE's.
    """

    def step(self, model_output, timestep, sample, **kwargs):  # pyright: ignore[reportIncompatibleMethodOverride]
        sigmas: Any = self.sigmas
        index = int(self.index_for_timestep(timestep) or 0)
        now, after = (float(sigma) for sigma in sigmas[index : index + 2])
        drift, noise = -model_output, 0.0
        if now < 1 and after > 0:
            eta, denoised = now / (1 - now), sample - now * model_output
            drift = drift + eta * ((1 - now) * denoised - sample) / now**2
            noise = (2 * eta * (now - after)) ** 0.5 * torch.randn_like(sample)
        return (sample + (now - after) * drift + noise,)


def euler_maruyama(config: Any) -> Any:
    return EulerMaruyama.from_config(config)


def dpm_solver(algorithm: str) -> Callable[[Any], Any]:
    """Return a maker of DPM-Solver++ 2M for flow models: "dpmsolver++" is its ODE, "sde-dpmsolver++" its SDE."""

    def make(config: Any) -> Any:
        return DPMSolverMultistepScheduler.from_config(
            config, algorithm_type=algorithm, prediction_type="flow_prediction", use_flow_sigmas=True
        )

    return make


class Steered:
    """A scheduler's `step` that weighs and resamples the particles before some of its steps.

    As in the library: the network has been called at x_t; its denoised prediction is decoded and scored; the state,
    the network's output and a multistep solver's history move with the particles that are kept.

    Args:
        scheduler: The scheduler whose step is taken.
        groups: P · K rows are P groups.
        boundaries: Steps before which particles are scored.
        score: Rewards of latents (P · K, …), shape (P, K), scaled by λ_r.
        generators: One per group.
    """

    def __init__(
        self, scheduler: Any, groups: int, particles: int, boundaries: Sequence[int],
        score: Callable[[Tensor], Tensor], generators: list[torch.Generator],
    ) -> None:  # fmt: skip
        self.scheduler, self.step_native = scheduler, scheduler.step
        self.boundaries, self.score, self.generators = boundaries, score, generators
        self.state = smc.init(groups, particles)
        self.roots = torch.arange(particles).expand(groups, particles)
        self.calls = self.scored = 0

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        if self.calls in self.boundaries:
            sigma = float(self.scheduler.sigmas[self.calls])
            scaled = self.score(sample - sigma * model_output)
            self.state, info = smc.step(self.state, scaled, ess_threshold=0.5, generators=self.generators)
            self.roots = self.roots.gather(1, info.ancestors) if self.scored else info.ancestors
            self.scored += 1
            width = scaled.shape[1]
            rows = (info.ancestors + width * torch.arange(len(scaled))[:, None]).flatten()
            model_output, sample = model_output[rows], sample[rows]
            history = getattr(self.scheduler, "model_outputs", ())
            self.scheduler.model_outputs = [None if one is None else one[rows] for one in history]
        self.calls += 1
        return self.step_native(model_output, timestep, sample, **kwargs)


def native_steered(scheduler: Callable[[Any], Any], *, start: float = 0.5) -> Method:
    """Feynman-Kac steering of a stochastic scheduler, scored as often as the library's transitions.

    Args:
        scheduler: Makes the scheduler from the native one's config.
        start: Fraction of the run from which on particles are scored.
    """

    def draw(pipe, reward, prompts: list[str], spending: Spending, seed: int) -> Population:
        number, steps, scale = spending.particles, spending.steps, spending.scale * reward.reward_scale
        asked = [prompt for prompt in prompts for _ in range(number)]
        marks = [round(k * steps / spending.transitions) for k in range(spending.transitions)]
        boundaries = [mark for mark in marks if mark >= start * steps and mark]

        def score(latents: Tensor) -> Tensor:
            return scale * reward(decoded(pipe, latents), asked).double().view(-1, number)

        generators = [torch.Generator().manual_seed(1000 * seed + group) for group in range(len(prompts))]
        made = scheduler(pipe.scheduler.config)
        steered = Steered(made, len(prompts), number, boundaries, score, generators)
        made.step = steered.step
        torch.manual_seed(seed)
        drawn = plain(lambda _: made)(pipe, reward, prompts, spending, seed)
        lineages = np.array([len(set(roots.tolist())) for roots in steered.roots], dtype=float)
        return replace(drawn, reward_calls=number * (steered.scored + 1), lineages=lineages)

    return draw
