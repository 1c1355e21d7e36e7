"""The rows of paper.py: ways to draw images of a prompt at equal network calls per particle, and what they cost."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from glassflows import (
    FeynmanKac,
    GLASSFlowMatchScheduler,
    GLASSScheduler,
    Ledger,
    MicroBatches,
    Steerer,
)
from glassflows.scheduler.hooks import Boundary
from glassflows.steering.budget import boundaries
from glassflows.steering.diversity import mean_distance

LATE = 3.0  # times the reward scale: what was chosen for 8 particles of 20 calls (steering.json)


class Method(NamedTuple):
    """A row of the table.

    Args:
        title: Its name in the table.
        particles: Images drawn of a prompt.
        scheduler: Options of the GLASS scheduler; None for the pipeline's own, unsteered.
        strategy: How particles are steered.
        twist: Strength of the twist.
    """

    title: str
    particles: int
    scheduler: dict[str, Any] | None = None
    strategy: FeynmanKac = FeynmanKac()
    twist: float = 0.0


def methods(settings: dict[str, Any], scale: float = 1.0) -> dict[str, Method]:
    """Return all methods by name.

    Args:
        settings: Those of a run: `calls`, `particles`, `transitions`, `reward_scale`, `late_scale`, `twist`.
        scale: λ_r of the reward, where `reward_scale` is None.
    """
    calls, particles, transitions = (settings[name] for name in ("calls", "particles", "transitions"))
    scale = settings["reward_scale"] or scale
    plain = FeynmanKac(reward_scale=scale, start=0.0)
    late = FeynmanKac(reward_scale=settings["late_scale"] or LATE * scale, start=0.5)
    as_often = FeynmanKac(reward_scale=scale, start=1 / transitions, score_every=max(1, calls // transitions))
    glass, ancestral = {"num_transitions": transitions}, {"num_transitions": calls}
    published = glass | {"solver_order": 1, "inner_grid": "condot", "correlation": 0.4}
    return {
        "ode": Method("one ODE image", 1),
        "best": Method(f"best of {particles}, ODE", particles),
        "ddpm": Method("FK, DDPM ancestral", particles, ancestral, as_often),
        "ddpm-every": Method("FK, DDPM ancestral, scored at every call", particles, ancestral, plain),
        "published": Method("FK, GLASS as published", particles, published, plain),
        "glass": Method("FK, GLASS", particles, glass, plain),
        "late": Method("FK, GLASS, late", particles, glass, late),
        "twisted": Method("FK, GLASS, late and twisted", particles, glass, late, settings["twist"]),
    }


# ---- what it costs ---------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """What images cost: evaluations of the denoiser, images scored and decoded, gradients of the reward."""

    network_calls: int
    reward_calls: int
    decodes: int
    gradients: int

    def times(self, number: int) -> Cost:
        return Cost(*(number * one for one in self))


def cost(method: Method, calls: int) -> Cost:
    """Return what a prompt costs by a method of `calls` network calls a particle."""
    inner: list[Boundary] = []
    if method.scheduler is not None:
        total = min(method.scheduler["num_transitions"], calls)
        inner = boundaries(total, calls)[1:]
    twisted = bool(method.twist)
    scored = 1 + sum(twisted or method.strategy.due(at) for at in inner)
    return Cost(calls, scored, scored, twisted * len(inner)).times(method.particles)


def estimate(chosen: dict[str, Method], calls: int, runs: int) -> str:
    """Return a table of what each method costs, for a prompt and for all `runs`, prompts times seeds."""
    costs = {method.title: cost(method, calls) for method in chosen.values()}
    costs[f"all, {runs} times"] = Cost(*(sum(column) for column in zip(*costs.values(), strict=True))).times(runs)
    head = "| for a prompt | network calls | images scored | decodes | gradients |\n" + "|---" * 5 + "|\n"
    return head + "\n".join(f"| {title} | " + " | ".join(f"{n:,}" for n in one) + " |" for title, one in costs.items())


def hours(todo: list[str], chosen: dict[str, Method], calls: int, rows: list[dict[str, Any]]) -> float:
    """Return the hours that runs of methods will take, by rows of runs that were; NaN without any.

    A method that has not been run is reckoned at the mean time of a network call.
    """
    spent = sum(row["network_calls"] for row in rows)
    call = sum(row["seconds"]["total"] for row in rows) / spent if spent else np.nan
    each = {}
    for name in set(todo):
        times = [row["seconds"]["total"] for row in rows if row["method"] == name]
        each[name] = np.mean(times) if times else call * cost(chosen[name], calls).network_calls
    return float(sum(each[name] for name in todo)) / 3600


# ---- runs ------------------------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """What a method draws for a prompt.

    Args:
        images: The best first, shape (K, 3, H, W), values in [0, 1], on the CPU.
        rewards: Theirs, shape (K,), float64.
        ledger: What they cost.
        lineages: Particles of the first scoring that have descendants among them.
        diversity: Mean distance of two of them.
    """

    images: Tensor
    rewards: Tensor
    ledger: Ledger
    lineages: int
    diversity: float


def draw(method: Method, pipe: Any, reward: Any, prompt: str, batches: MicroBatches, call: dict[str, Any]) -> Drawn:
    """Draw images of a prompt; `call` are the pipeline's own arguments, steps and generator among them."""
    if method.scheduler is None:
        return _plain(pipe, reward, prompt, method.particles, batches, call)
    native = pipe.scheduler
    is_flow = isinstance(native, FlowMatchEulerDiscreteScheduler)
    pipe.scheduler = (GLASSFlowMatchScheduler if is_flow else GLASSScheduler).from_scheduler(native, **method.scheduler)
    try:
        steer = Steerer(
            pipe, reward, method.strategy, method.particles, batches=batches, twist=method.twist, distributed=False
        )
        out = steer(prompt, output_type="pt", **call)
    finally:
        pipe.scheduler = native
    return Drawn(out.images.cpu(), out.image_rewards, out.ledger, int(out.lineages[0]), float(out.diversity[0]))


def _plain(pipe: Any, reward: Any, prompt: str, number: int, batches: MicroBatches, call: dict[str, Any]) -> Drawn:
    """Draw images by the pipeline's own scheduler, some at a time, and score them."""
    ledger, parts = Ledger(), []
    counts = "num_images_per_prompt" in inspect.signature(pipe.__call__).parameters
    with torch.no_grad(), ledger.timing("total"):
        for rows in torch.arange(number).split(batches.network or number):
            size = len(rows)
            given = {"prompt": prompt, "num_images_per_prompt": size} if counts else {"prompt": [prompt] * size}
            parts.append(np.asarray(pipe(**given, output_type="np", **call).images, np.float32))
            ledger.network_calls += size * len(pipe.scheduler.timesteps)
        images = torch.from_numpy(np.concatenate(parts)).movedim(-1, 1)
        with ledger.timing("reward"):
            seen = images.to(pipe._execution_device).split(batches.reward or number)
            rewards = torch.cat([torch.as_tensor(reward(part, [prompt] * len(part))) for part in seen])
    ledger.reward_calls = number
    rewards, order = rewards.double().cpu().sort(descending=True)
    images = images[order]
    return Drawn(images, rewards, ledger, number, float(mean_distance(images, number)))
