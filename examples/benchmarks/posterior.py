"""Posterior samples and value functions against network calls, after section 6.1 of arXiv:2509.25170.

Quality: energy distance × 1000 between samples of p(z | x_t) and true ones, each state on its own, averaged over the
states x_t. Value: Pearson correlation over states between V_t(x_t) = log E[exp r(z) | x_t] and its estimate. For the
mixture truth is a closed form and r is linear; for the scenes it is many samples with many calls and r the CLIP score.
The ancestral sampler and the SDE walk from t to data in as many steps; GLASS is one transition. About 4 minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from problems import PROBLEMS, Mixture, Scenes
from torch import Tensor
from transitions import euler_maruyama

from glassflows import sample_posterior, sample_transition
from glassflows.flow.sample import Denoiser
from scenes import decoded
from scenes.distance import energy_distance

CALLS = (2, 4, 8, 16)
TIME = 0.4
Sampler = Callable[[Denoiser, Tensor, int, torch.Generator], Tensor]


def ancestral(denoiser: Denoiser, x: Tensor, num_steps: int, generator: torch.Generator) -> Tensor:
    """DDPM ancestral sampling from x_t to data: transitions of one call each, every one with fresh noise."""
    for t, t_next in pairwise(np.linspace(TIME, 1, num_steps + 1).tolist()):
        x = sample_transition(denoiser, x, t, t_next, num_steps=1, generator=generator)
    return x


def sde(denoiser: Denoiser, x: Tensor, num_steps: int, generator: torch.Generator) -> Tensor:
    """The same by Euler-Maruyama."""
    return euler_maruyama(denoiser, x, np.linspace(TIME, 1, num_steps + 1).tolist(), generator)


def glass(**options) -> Sampler:
    """One GLASS transition to data."""

    def draw(denoiser: Denoiser, x: Tensor, num_steps: int, generator: torch.Generator) -> Tensor:
        return sample_posterior(denoiser, x, TIME, num_steps=num_steps, generator=generator, **options)

    return draw


SAMPLERS: dict[str, Sampler] = {
    "GLASS, ours": glass(),
    "GLASS as published (CondOT, Euler)": glass(solver_order=1, inner_grid="condot"),
    "DDPM ancestral": ancestral,
    "SDE, Euler-Maruyama": sde,
}
DIRECTION = torch.linspace(-1, 1, 16, dtype=torch.float64)


def noised(problem: Mixture | Scenes, number: int, generator: torch.Generator) -> Tensor:
    """Return states x_t of true samples."""
    z = problem.truth(number, generator)
    return TIME * z + (1 - TIME) * torch.randn(z.shape, generator=generator, dtype=z.dtype)


def log_mean_exp(rewards: Tensor) -> Tensor:
    return rewards.double().logsumexp(1) - np.log(rewards.shape[1])


def measure(problem: Mixture | Scenes, states: int, samples: int, seed: int) -> dict[str, list[tuple[float, float]]]:
    """Return (distance, correlation) of each sampler at each number of calls."""
    generator = torch.Generator().manual_seed(seed)
    denoiser = problem.denoiser(states)
    if isinstance(problem, Mixture):
        x = noised(problem, states, generator)
        true = posterior_samples(problem, x, 8 * samples, generator)
        value = problem.law.value(x, TIME, DIRECTION)
    else:  # states of the model's own: partly denoised samples, so that they belong to their prompts
        first = sample_posterior(denoiser, problem.noise(states, generator), 0.0, num_steps=20, generator=generator)
        x = TIME * first + (1 - TIME) * torch.randn(first.shape, generator=generator)
        true = glass()(denoiser, x.repeat_interleave(4 * samples, 0), 24, generator)
        value = log_mean_exp(rewards(problem, true, states)[:, samples:])
    features = problem.features(true)
    again, truth = features.view(states, -1, features.shape[-1]).split([samples, len(true) // states - samples], 1)
    rows: dict[str, list[tuple[float, float]]] = {"true samples": []}
    for name, sampler in SAMPLERS.items():
        rows[name] = []
        for calls in CALLS:
            z = sampler(denoiser, x.repeat_interleave(samples, 0), calls, generator)
            found = problem.features(z).view(states, samples, -1)
            distance = np.mean([energy_distance(a, b) for a, b in zip(found, truth, strict=True)])
            estimate = log_mean_exp(rewards(problem, z, states))
            rows[name].append((1000 * float(distance), float(np.corrcoef(estimate, value)[0, 1])))
    floor = np.mean([energy_distance(a, b) for a, b in zip(again, truth, strict=True)])
    estimate = log_mean_exp(rewards(problem, true, states)[:, :samples])
    rows["true samples"] = [(1000 * float(floor), float(np.corrcoef(estimate, value)[0, 1]))]
    return rows


def posterior_samples(problem: Mixture, x: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Return exact samples of p(z | x_t), `number` for each row."""
    law = problem.law.posterior(x, TIME)
    chosen = torch.multinomial(law.weights, number, replacement=True, generator=generator)
    means = law.means.gather(1, chosen[..., None].expand(-1, -1, x.shape[1]))
    noise = torch.randn(means.shape, generator=generator, dtype=means.dtype)
    return (means + law.variance**0.5 * noise).flatten(0, 1)


def rewards(problem: Mixture | Scenes, z: Tensor, states: int) -> Tensor:
    """Return the rewards of samples, shape (states, samples)."""
    if isinstance(problem, Mixture):
        return (z @ DIRECTION).view(states, -1)
    repeats = len(z) // states
    prompts = [prompt for prompt in problem.prompts(states) for _ in range(repeats)]
    reward = problem.reward
    return reward.reward_scale * reward(decoded(problem.pipe, z), prompts).view(states, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=12, help="states of the scenes model; 0 leaves it out")
    args = parser.parse_args()
    print(f"t = {TIME}, mean ± s.d. over {args.seeds} seeds; distance × 1000 | correlation of values\n")
    for title in ("16-D mixture", "scenes"):
        states, samples = (args.scenes, 16) if title == "scenes" else (100, 32)
        if not states:
            continue
        start = time.perf_counter()
        runs = [measure(PROBLEMS[title](seed), states, samples, seed) for seed in range(args.seeds)]
        print(f"| {title}: {states} states, {samples} samples | " + " | ".join(f"{n} calls" for n in CALLS) + " |")
        print("|---" * (len(CALLS) + 1) + "|")
        for name in runs[0]:
            values = np.array([one[name] for one in runs])
            mean, spread = values.mean(0), values.std(0, ddof=1)
            cells = [f"{m[0]:.0f} ± {s[0]:.0f} · {m[1]:.3f} ± {s[1]:.3f}" for m, s in zip(mean, spread, strict=True)]
            print(f"| {name} | " + " | ".join(cells + [""] * (len(CALLS) - len(cells))) + " |")
        print(flush=True)
        print(f"{title}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
