"""Distance to the true law against network calls, for the ways to sample a pre-trained model: `make transitions`.

Two mixtures and the scenes model; energy distance to true samples (of the scenes in CLIP features and in latents) times
1000, the unbiased estimate: what a perfect sampler gets is the row "true samples". Within a seed all methods start from
the same noise. Stochastic methods make K = 5 transitions, or one per call. Under 10 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SASolverScheduler
from problems import PROBLEMS, ROOT, Mixture, Scenes
from torch import Tensor

from glassflows import sample
from glassflows.flow.sample import Denoiser
from scenes.distance import energy_distance

TRANSITIONS = 5
CALLS = (6, 10, 20, 40)
Method = Callable[[Denoiser, Tensor, list[float], torch.Generator], Tensor]


def chain(num_transitions: int | None, **options: Any) -> Method:
    """Transitions of this library; None makes one per call."""

    def draw(denoiser: Denoiser, x: Tensor, times: list[float], generator: torch.Generator) -> Tensor:
        return sample(
            denoiser,
            x,
            num_steps=len(times) - 1,
            num_transitions=num_transitions or len(times) - 1,
            times=times,
            generator=generator,
            **options,
        )

    return draw


def euler_maruyama(denoiser: Denoiser, x: Tensor, times: list[float], generator: torch.Generator) -> Tensor:
    """Euler-Maruyama for dx = (u + η s) dt + √(2η) dw, u = (ẑ − x)/(1 − t), s = (t ẑ − x)/(1 − t)², η = (1 − t)/t.

    Its exact transitions are those of ρ_DDPM. η is infinite at t = 0: the first step and the last are the ODE's.
    """
    for t, t_next in pairwise(times):
        z, step = denoiser(x, t), t_next - t
        drift = (z - x) / (1 - t)
        if t > 0 and t_next < 1:
            eta = (1 - t) / t
            drift = drift + eta * (t * z - x) / (1 - t) ** 2
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            x = x + (2 * eta * step) ** 0.5 * noise
        x = x + step * drift
    return x


def stochastic_flow_matching(denoiser: Denoiser, x: Tensor, times: list[float], generator: torch.Generator) -> Tensor:
    """`FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)` of diffusers."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=[1 - t for t in times[:-1]])
    for t, now in zip(scheduler.timesteps, times, strict=False):
        velocity = (x - denoiser(x, now)) / (1 - now)
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))  # it takes no generator here
        x = scheduler.step(velocity, t, x).prev_sample.to(x.dtype)
    return x


def multistep(make: Callable[[], Any], last: float = 0.0) -> Method:
    """A multistep scheduler of diffusers for flows, at the noise levels of the problem.

    The first level is 0.999, which is diffusers' own: at 1 the logarithm of the signal-to-noise ratio is infinite.

    Args:
        make: Makes the scheduler.
        last: The level after the last call.
    """

    def draw(denoiser: Denoiser, x: Tensor, times: list[float], generator: torch.Generator) -> Tensor:
        scheduler, levels = make(), [0.999, *(1 - t for t in times[1:-1]), last]
        scheduler.set_timesteps(len(times) - 1)
        scheduler.set_begin_index(0)
        scheduler.sigmas = torch.tensor(levels)
        for sigma in levels[:-1]:
            velocity = (x - denoiser(x, 1 - sigma)) / sigma
            x = scheduler.step(velocity, 1000 * sigma, x, generator=generator).prev_sample
        return x

    return draw


FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
METHODS: dict[str, Method] = {
    "ODE, Euler": chain(1, solver_order=1),
    "ODE, ours": chain(1),
    "GLASS as published (CondOT, Euler)": chain(TRANSITIONS, solver_order=1, inner_grid="condot"),
    "GLASS, ours": chain(TRANSITIONS),
    "DDPM ancestral": chain(None),
    "SDE, Euler-Maruyama": euler_maruyama,
    "stochastic flow matching (diffusers)": stochastic_flow_matching,
    "ODE, DPM-Solver++ 2M (diffusers)": multistep(lambda: DPMSolverMultistepScheduler(**FLOW)),
    "SDE, DPM-Solver++ 2M (diffusers)": multistep(
        lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FLOW)
    ),
    "SA-Solver (diffusers)": multistep(lambda: SASolverScheduler(**FLOW), last=0.001),  # which has no step to 0
}


Table = dict[str, list[float]]


def run(problem: Mixture | Scenes, number: int, seed: int) -> dict[str, Table]:
    """Return, for each view of the problem, 1000 × the distance of each method at each number of calls."""
    generator = torch.Generator().manual_seed(1000 + seed)
    true = problem.truth(number, generator, repeats=8 if isinstance(problem, Scenes) else 1)
    denoiser = problem.denoiser(number)
    drawn = {"true samples": [problem.truth(number, generator)]}
    x = problem.noise(number, generator)
    for name, method in METHODS.items():
        drawn[name] = [method(denoiser, x, problem.times(n), torch.Generator().manual_seed(seed)) for n in CALLS]
    tables = {}
    for title, view in problem.views().items():
        target = view(true)
        tables[title] = {
            name: [1000 * energy_distance(view(z), target) for z in samples] for name, samples in drawn.items()
        }
    return tables


def plot(tables: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(tables), figsize=(3.9 * len(tables), 3.9), layout="constrained")
    for axis, (title, rows) in zip(np.atleast_1d(axes), tables.items(), strict=True):
        for name, values in rows.items():
            mean, spread = values.mean(0), values.std(0, ddof=1)
            if name == "true samples":
                axis.axhspan(mean[0] - spread[0], mean[0] + spread[0], color="0.85", label=name)
            else:
                bold = 2.2 if name.startswith("GLASS, ours") else 1.1
                axis.errorbar(CALLS, mean, spread, label=name, lw=bold, capsize=2)
        scale = "linear" if title.startswith("scenes") else "symlog"
        axis.set(title=title, xlabel="network calls", xscale="log", yscale=scale, xticks=CALLS)
        axis.set_xticklabels(CALLS)
        axis.minorticks_off()
    np.atleast_1d(axes)[0].set_ylabel("energy distance × 1000")
    handles, labels = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--number", type=int, default=4000, help="samples of the mixtures")
    parser.add_argument("--scenes", type=int, default=64, help="samples of the scenes model; 0 leaves it out")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "transitions.png")
    args = parser.parse_args()

    tables: dict[str, dict[str, np.ndarray]] = {}
    for title, make in PROBLEMS.items():
        number = args.scenes if title == "scenes" else args.number
        if not number:
            continue
        start = time.perf_counter()
        runs = [run(make(seed), number, seed) for seed in range(args.seeds)]
        for view, first in runs[0].items():
            tables[view] = {name: np.array([one[view][name] for one in runs]) for name in first}
        print(f"{title}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    print(f"Energy distance × 1000 to the true law, mean ± s.d. over {args.seeds} seeds\n")
    for title, rows in tables.items():
        print(f"| {title} | " + " | ".join(f"{n} calls" for n in CALLS) + " |")
        print("|---" * (len(CALLS) + 1) + "|")
        for name, values in rows.items():
            cells = [f"{m:.1f} ± {s:.1f}" for m, s in zip(values.mean(0), values.std(0, ddof=1), strict=True)]
            cells += [""] * (len(CALLS) - len(cells))
            print(f"| {name} | " + " | ".join(cells) + " |")
        print()
    plot(tables, args.plot)


if __name__ == "__main__":
    main()
