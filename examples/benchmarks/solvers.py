"""Why the solver is what it is: error of each choice against a converged run with the same noises (docs/solvers.md).

Rows are single departures from the default; columns the network calls per transition. Median over samples of the root
mean square error per dimension, over dimensions of unit data; K = 6 transitions on the mixture, 5 on the scenes model;
plain and with classifier-free guidance. About 12 minutes on one core; `--scenes 0` does the mixture alone in seconds.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from problems import Mixture, Scenes, cloud, published, ring
from scipy.integrate import quad
from torch import Tensor

from glassflows import RectifiedFlow
from glassflows.flow.sample import Denoiser, run_block, run_chain
from glassflows.flow.solver import Block, Solver
from glassflows.flow.state import start
from glassflows.flow.timetable import timetable

INNER = (1, 2, 3, 4, 6, 10)
GUIDANCE = (0.0, 4.0, 7.5)
FLOW = RectifiedFlow()


class Quadrature(ABC):
    """A variable of λ integrated numerically."""

    def __init__(self, base_snr: float) -> None:
        self.base_snr = base_snr

    def integral(self, start: float, end: float) -> float:
        return quad(lambda lam: self(lam) - self(start), start, end, limit=200)[0]

    @abstractmethod
    def __call__(self, lam: float) -> float: ...


class FlowTime(Quadrature):
    """τ = 1 / (1 + √P), the time left on the straight path."""

    def __call__(self, lam: float) -> float:
        return 1 / (1 + math.sqrt(self.base_snr + lam**2))


class Lambda(Quadrature):
    """λ itself; as it has no value at data, the last step is not extrapolated."""

    def __call__(self, lam: float) -> float:
        return lam


VARIANTS: dict[str, dict[str, Any]] = {
    "**default**": {},
    "Euler": {"order": 1},
    "no corrector": {"corrector": False},
    "corrector along a line": {"curved": False},
    "ẑ linear in flow time τ": {"variable": FlowTime},
    "ẑ linear in λ": {"variable": Lambda, "last_step": 0.0},
    "last step: 0 extrapolated": {"last_step": 0.0},
    "last step: all extrapolated": {"last_step": 1.0},
    "boundary: discard history": {"boundary": "discard"},
    "boundary: correct only": {"boundary": "correct"},
    "fresh noise unanswered": {"response": 0.0},
    "limiter without memory": {"rough": math.inf},
    "no limiter": {"trust": math.inf},
    "no limiter, history discarded": {"trust": math.inf, "boundary": "discard"},
}
CONVERGED = {"boundary": "discard", "response": 0.0}


def laid(times: list[float], transitions: int, options: dict[str, Any]) -> list[Block]:
    """Lay transitions with calls at `times` and any options of the solver."""
    levels = [FLOW.level(t) for t in times]
    return timetable(levels, transitions, schedule=FLOW, correlation="ddpm", solver=Solver(**options))


def chain(denoiser: Denoiser, draws: Sequence[Tensor], times: list[float], options: dict[str, Any]) -> Tensor:
    """Run one transition per draw."""
    return run_chain(laid(times, len(draws), options), denoiser, draws[0], lambda k: draws[k + 1])


def table(problem: Mixture | Scenes, number: int, transitions: int, guidance: float, converged: int) -> None:
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    draws = [problem.noise(number, generator) for _ in range(transitions)]
    denoiser = problem.denoiser(number, guidance)
    exact = chain(denoiser, draws, problem.times(converged * transitions), CONVERGED)
    title = problem.name + (f", guidance {guidance}" if guidance else "")
    print(f"| {title} | " + " | ".join(map(str, INNER)) + " |")
    print("|---" * (len(INNER) + 1) + "|")
    for name, options in VARIANTS.items():
        errors = []
        for n in INNER:
            error = chain(denoiser, draws, problem.times(n * transitions), options) - exact
            errors.append(error.flatten(1).square().mean(1).sqrt().median().item())
        print(f"| {name} | " + " | ".join(f"{error:.4f}" for error in errors) + " |", flush=True)
    print(flush=True)
    print(f"{title}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def remembered(problem: Mixture | Scenes, number: int, guidance: float, transitions: int = 5, inner: int = 2) -> None:
    """Print the limiter's geometric mean of Δ²/budget after each transition: median (5 to 95 % of the samples)."""
    generator, cells = torch.Generator().manual_seed(0), []
    draws = [problem.noise(number, generator) for _ in range(transitions)]
    denoiser, blocks = problem.denoiser(number, guidance), laid(problem.times(inner * transitions), transitions, {})
    state = start(draws[0], blocks[0])
    for block, noise in zip(blocks, [None, *draws[1:]], strict=True):
        _, state = run_block(block, denoiser, state, noise)
        assert state.roughness is not None
        means = (state.roughness.total / state.roughness.number).exp().flatten().double()
        low, middle, high = means.quantile(means.new_tensor([0.05, 0.5, 0.95])).tolist()
        cells.append(f"{middle:.2g} ({low:.2g} to {high:.2g})")
    print(f"| {problem.name}{f', guidance {guidance}' if guidance else ''} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=400, help="samples of the mixture")
    parser.add_argument("--scenes", type=int, default=32, help="samples of the scenes model; 0 leaves it out")
    parser.add_argument("--memory", action="store_true", help="print what the limiter remembers, and nothing else")
    args = parser.parse_args()
    if args.memory:
        print("| after transition | 1 | 2 | 3 | 4 | 5 |\n|---|---|---|---|---|---|")
        for problem in (ring(), cloud()):
            remembered(problem, args.number, 0.0)
        for guidance in GUIDANCE:
            remembered(Scenes(), args.scenes, guidance)
        return
    for guidance in GUIDANCE:
        table(published(), args.number, 6, guidance, 400)
    if args.scenes:
        scenes = Scenes()
        for guidance in GUIDANCE:
            table(scenes, args.scenes, 5, guidance, 30)


if __name__ == "__main__":
    main()
