"""The GLASS paper's tables in miniature, by its own protocol: `python miniature.py 1`, `3` or `4` (docs/evidence.md).

Table 1: rewards × methods, 8 particles of 20 calls in 5 transitions, everything scored from the first boundary on.
Table 3: samples that nothing steers, by ODE, SDE and GLASS. Table 4: steering against calls. Hard prompts of the
scenes; "right" is the verifier's verdict on the image of highest reward. Standard errors are over prompts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from native import euler_maruyama, native_steered
from steering import PUBLISHED, Bench, prompts_of, with_error

from glassflows import BestOfN
from scenes.methods import Method, Spending, feynman_kac, ours, plain, steered

PARTICLES, CALLS, TRANSITIONS = 8, 20, 5
PAPER = PUBLISHED | {"correlation": 0.4}

STEERED: dict[str, tuple[Method, int]] = {
    "one ODE image": (plain(), 1),
    "best of 8, ODE": (plain(), PARTICLES),
    "FK, SDE (Euler-Maruyama)": (native_steered(euler_maruyama, start=0.0), PARTICLES),
    "FK, GLASS, ρ = 0.4, as published": (steered(feynman_kac(start=0.0), scheduler=PAPER), PARTICLES),
    "FK, GLASS, as here by default": (steered(feynman_kac()), PARTICLES),
}


def unsteered(scheduler: dict[str, Any]) -> Method:
    """Samples of a `GLASSScheduler` with options."""
    return steered(lambda scale: BestOfN(), scheduler=scheduler)


UNSTEERED: dict[str, Method] = {
    "ODE, Euler": plain(),
    "ODE, two-step": plain(ours),
    "SDE, Euler-Maruyama": plain(euler_maruyama),
    "GLASS, ρ = 0.4, as published": unsteered(PAPER),
    "GLASS, as here": unsteered({"correlation": "ddpm"}),
}


def measured(bench: Bench, method: Method, spending: Spending, prompts: list[str], seeds: int) -> dict[str, np.ndarray]:
    """Return each measure, the mean over seeds, shape (P,)."""
    runs = []
    for seed in range(seeds):
        torch.manual_seed(seed)  # of schedulers that take no generator
        runs.append(bench.measures(method(bench.pipe, bench.reward, prompts, spending, seed), prompts))
    return {measure: np.mean([run[measure] for run in runs], 0) for measure in runs[0]}


def table(head: list[str], rows: dict[str, Callable[[], list[str]]]) -> None:
    print("| | " + " | ".join(head) + " |")
    print("|---" * (len(head) + 1) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells()) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=int, choices=(1, 3, 4))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calls", type=int, nargs="+", default=(10, 20, 40), help="of each particle, tables 3 and 4")
    args = parser.parse_args()
    bench = Bench("clip")
    prompts = prompts_of("report")[: args.prompts]
    print(f"{len(prompts)} hard prompts, {args.seeds} seeds, mean ± standard error over prompts\n")

    def draw(which: Bench, method: Method, particles: int, calls: int) -> dict[str, np.ndarray]:
        return measured(which, method, Spending(particles * calls, calls, TRANSITIONS), prompts, args.seeds)

    def both(name: str, benches: list[Bench], calls: list[int]) -> list[str]:
        method, particles = STEERED[name]
        runs = [draw(which, method, particles, number) for which in benches for number in calls]
        return [f"{with_error(run['reward'], '.1f')} / {with_error(run['right'], '.0f')}" for run in runs]

    def quality(method: Method) -> list[str]:
        runs = [draw(bench, method, 4, number) for number in args.calls]
        return [f"{with_error(run['all right'], '.1f')} · {with_error(run['distance'], '.2f')}" for run in runs]

    if args.table == 1:
        benches = [bench, Bench("rules")]
        head = ["CLIP: reward / right, %", "half of the rules: reward / the other half right, %"]
        table(head, {name: lambda name=name: both(name, benches, [CALLS]) for name in STEERED})
    elif args.table == 3:
        head = [f"{number} calls: right, % · distance" for number in args.calls]
        table(head, {name: lambda method=method: quality(method) for name, method in UNSTEERED.items()})
    else:
        head = [f"{number} calls: reward / right, %" for number in args.calls]
        table(head, {name: lambda name=name: both(name, [bench], list(args.calls)) for name in STEERED})


if __name__ == "__main__":
    main()
