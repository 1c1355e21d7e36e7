"""The ways to draw images of prompts that the demo and the benchmarks compare, each at a number of network calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from glassflows import Calibration, FeynmanKac, GLASSScheduler, Steerer
from glassflows.steering.diversity import mean_distance

from . import CALL
from .grammar import training_prompts


@dataclass(frozen=True)
class Spending:
    """How the network calls for a prompt are spent, and what a method may choose besides.

    Args:
        calls: Network calls for each prompt, all particles together.
        steps: Calls of each particle to its end; there are `calls` / `steps` particles, fewer where they look ahead.
        transitions: Stochastic transitions of those steps.
        scale: λ_r, in units of the reward's own.
        twist: Strength of the reward's gradient.
    """

    calls: int
    steps: int
    transitions: int = 5
    scale: float = 1.0
    twist: float = 0.0

    @property
    def particles(self) -> int:
        return self.calls // self.steps


@dataclass(frozen=True)
class Population:
    """What a method draws for P prompts: K images of each, that of the highest reward first.

    Args:
        images: Shape (P, K, 3, H, W), in [0, 1].
        rewards: Shape (P, K).
        calls: Network calls for each prompt.
        reward_calls: Images scored for each prompt, on the way and at the end.
        seconds: Time of the whole, for all prompts.
        lineages: Ancestors at the first scoring that have descendants at the end, shape (P,).
    """

    images: np.ndarray
    rewards: np.ndarray
    calls: float
    reward_calls: float
    seconds: float
    lineages: np.ndarray

    @property
    def diversity(self) -> np.ndarray:
        """The mean root-mean-square distance of two images of a prompt, shape (P,); 0 of a single one."""
        return mean_distance(torch.from_numpy(self.images).flatten(0, 1), self.images.shape[1]).numpy()


Method = Callable[[Any, Any, list[str], Spending, int], Population]
"""Draws images of prompts from (pipeline, reward, prompts, spending, seed)."""


def best_first(images: torch.Tensor, rewards: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return images (P · K, 3, H, W) as (P, K, 3, H, W), and rewards (P, K), both by falling reward."""
    rewards, order = rewards.double().sort(dim=1, descending=True, stable=True)
    images = images.unflatten(0, order.shape)
    rows = torch.arange(len(order), device=images.device)[:, None]
    return images[rows, order.to(images.device)].float().cpu().numpy(), rewards.cpu().numpy()


def plain(scheduler: Callable[[Any], Any] | None = None) -> Method:
    """Samples of the pipeline's native sampler, or of another scheduler made from the native one's config."""

    def draw(pipe, reward, prompts, spending, seed) -> Population:
        native, number, start = pipe.scheduler, spending.particles, time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        try:
            pipe.scheduler = scheduler(native.config) if scheduler else native
            images = pipe(
                prompts, num_images_per_prompt=number, num_inference_steps=spending.steps, generator=generator,
                output_type="pt", **CALL,
            ).images  # fmt: skip
        finally:
            pipe.scheduler = native
        rewards = reward(images, [prompt for prompt in prompts for _ in range(number)]).view(-1, number)
        seconds = time.perf_counter() - start
        lineages = np.full(len(prompts), float(number))
        return Population(*best_first(images, rewards), number * spending.steps, number, seconds, lineages)

    return draw


def ours(config: Any) -> GLASSScheduler:
    """Return the two-step ODE."""
    return GLASSScheduler.from_config(config, num_transitions=1)


def steered(strategy: Callable[[float], Any], scheduler: dict[str, Any] | None = None, **options: Any) -> Method:
    """A `Steerer` with a strategy made from λ_r, and with options of the `GLASSScheduler` that it runs."""

    def draw(pipe, reward, prompts, spending, seed) -> Population:
        native, made = pipe.scheduler, strategy(spending.scale * reward.reward_scale)
        settings = {"num_transitions": spending.transitions, "twist": spending.twist} | options
        try:
            pipe.scheduler = GLASSScheduler.from_config(native.config, **scheduler) if scheduler else native
            first, *_ = getattr(made, "widths", None) or (2,)  # `for_budget` finds the number
            return _population(Steerer(pipe, reward, made, first, **settings), prompts, spending, seed)
        finally:
            pipe.scheduler = native

    return draw


def ancestral(*, alike: bool) -> Method:
    """Feynman-Kac steering with one call per transition.

    Args:
        alike: Whether it scores as often as a method with `spending.transitions` does; else at every call.
    """

    def draw(pipe, reward, prompts, spending, seed) -> Population:
        every = max(1, round(spending.steps / spending.transitions)) if alike else 1
        strategy = FeynmanKac(reward_scale=spending.scale * reward.reward_scale, score_every=every)
        steer = Steerer(pipe, reward, strategy, num_transitions=spending.steps)
        return _population(steer, prompts, spending, seed)

    return draw


def calibrated(number: int = 32) -> Method:
    """Feynman-Kac steering from the first boundary on, calibrated on training prompts, which it does not count."""
    known: dict[tuple[int, int], Calibration] = {}

    def draw(pipe, reward, prompts, spending, seed) -> Population:
        scale, transitions = spending.scale * reward.reward_scale, spending.transitions
        steer = Steerer(pipe, reward, FeynmanKac(reward_scale=scale, start=0.0), num_transitions=transitions)
        key = spending.steps, transitions
        if key not in known:
            seen, generator = training_prompts(number), torch.Generator().manual_seed(0)
            known[key] = steer.calibrate(seen, num_inference_steps=spending.steps, generator=generator, **CALL)
        strategy = FeynmanKac(reward_scale=scale, start=0.0, calibration=known[key])
        return _population(Steerer(pipe, reward, strategy, num_transitions=transitions), prompts, spending, seed)

    return draw


def _population(steer: Steerer, prompts: list[str], spending: Spending, seed: int) -> Population:
    steer = steer.for_budget(spending.steps, network_calls=spending.calls)
    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    out = steer(prompts, num_inference_steps=spending.steps, generator=generator, output_type="pt", **CALL)
    seconds = time.perf_counter() - start
    calls, scored = out.ledger.network_calls / len(prompts), out.ledger.reward_calls / len(prompts)
    images, rewards = best_first(out.images, out.image_rewards.unflatten(0, out.order.shape))
    return Population(images, rewards, calls, scored, seconds, out.lineages.double().numpy())


def feynman_kac(**options: Any) -> Callable[[float], FeynmanKac]:
    """Return a maker of the strategy from λ_r."""
    return lambda scale: FeynmanKac(reward_scale=scale, **options)


SHOWN: dict[str, tuple[Method, Spending]] = {
    "one image": (plain(), Spending(20, 20)),
    "best of 26": (plain(), Spending(160, 6)),
    "FK, DDPM ancestral": (ancestral(alike=True), Spending(160, 8, transitions=8, scale=3.0)),
    "FK, GLASS": (steered(feynman_kac()), Spending(160, 4, transitions=2, scale=3.0)),
    "FK, GLASS, twisted": (steered(feynman_kac()), Spending(160, 6, transitions=3, scale=10.0, twist=0.5)),
}
"""What the demo shows, each spending its calls as chosen on other prompts (benchmarks/steering.json)."""
