"""The ways to draw an image of each prompt that the demo and the benchmark compare, at equal calls per particle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from glassflows import FeynmanKacSteerer


@dataclass(frozen=True)
class Drawn:
    """What a method draws for P prompts.

    Args:
        images: Its answer to each prompt, the image of highest reward, shape (P, 3, H, W).
        rewards: Their rewards, shape (P,).
        population: Mean reward of all particles of each prompt, shape (P,).
        calls: Network calls spent on each prompt.
        reward_calls: Images scored for each prompt, on the way and at the end.
    """

    images: np.ndarray
    rewards: np.ndarray
    population: np.ndarray
    calls: int
    reward_calls: int


LATE_SCALE = 2.0
"""λ_r of CLIP scores where only the second half is scored, chosen on other prompts (benchmarks/options.py)."""

Method = Callable[[Any, Any, list[str], int, torch.Generator, dict[str, Any]], Drawn]


def ode(particles: int) -> Method:
    """Best of `particles` samples of the pipeline's native ODE sampler (Euler)."""

    def draw(pipe, reward, prompts, calls, generator, call) -> Drawn:
        images = pipe(
            prompts, num_images_per_prompt=particles, num_inference_steps=calls,
            generator=generator, output_type="pt", **call,
        ).images  # fmt: skip
        scores = reward(images, [prompt for prompt in prompts for _ in range(particles)]).view(-1, particles)
        best = scores.argmax(1) + particles * torch.arange(len(prompts))
        best_scores, population = scores.max(1).values.numpy(), scores.mean(1).numpy()
        return Drawn(images[best].numpy(), best_scores, population, particles * calls, particles)

    return draw


def steered(particles: int, num_transitions: int | None, **options: Any) -> Method:
    """Feynman-Kac steering; one transition is best-of-n of our ODE, None is one call per transition.

    It scores from the first boundary on, as published, unless `start` says otherwise.
    """

    def draw(pipe, reward, prompts, calls, generator, call) -> Drawn:
        settings = {"num_transitions": num_transitions or calls, "start": 0.0} | options
        steerer = FeynmanKacSteerer(pipe, reward, num_particles=particles, **settings)
        out = steerer(prompts, num_inference_steps=calls, generator=generator, output_type="pt", **call)
        best = out.images.view(len(prompts), particles, *out.images.shape[1:])[:, 0]
        rewards = out.rewards.float()
        spent = (out.ledger.network_calls // len(prompts), out.ledger.reward_calls // len(prompts))
        return Drawn(best.numpy(), rewards.max(1).values.numpy(), rewards.mean(1).numpy(), *spent)

    return draw


def methods(particles: int) -> dict[str, Method]:
    """Return the methods compared, by name, for populations of `particles`."""
    return {
        "ODE, one image": ode(1),
        f"ODE, best of {particles}": ode(particles),
        f"ODE two-step, best of {particles}": steered(particles, 1, ess_threshold=0.0),
        f"GLASS, best of {particles}": steered(particles, 5, ess_threshold=0.0, start=1.0),
        "FK, one call per transition": steered(particles, None),
        "FK, one call per transition, every fifth scored": steered(particles, None, score_every=5),
        "FK, GLASS": steered(particles, 5),
        "FK, GLASS, late": steered(particles, 5, start=0.5, reward_scale=LATE_SCALE),
        "FK, GLASS, late and twisted": steered(particles, 5, start=0.5, reward_scale=LATE_SCALE, twist=0.5),
    }
