"""What a scheduler costs beside its network: ours, FlowMatchEuler's and UniPC's `step` in pairs, on one thread.

    OMP_NUM_THREADS=1 python examples/benchmarks/overhead.py

Runs of `--calls` calls in float32, each scheduler in turn, `--runs` times; no network, its outputs are given. Of each
call the least and the median over runs are taken: "step" is the median over calls, which are mostly within transitions,
"all calls" the mean, the noise that is drawn at four boundaries included. "held" is what a finished run keeps, in units
of its latents. About a minute.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from glassflows import GLASSScheduler

SHAPES = ((1, 4096, 64), (8, 4096, 64))
Make = Callable[[], Any]


def glass(**options: Any) -> Make:
    """Our counterpart of FlowMatchEuler, in five transitions unless told otherwise."""
    return lambda: GLASSScheduler.from_config(FlowMatchEulerDiscreteScheduler().config, **options)


SCHEDULERS: dict[str, Make] = {
    "FlowMatchEuler": lambda: FlowMatchEulerDiscreteScheduler(),
    "ours, order 1, one transition": glass(solver_order=1, num_transitions=1),
    "ours, order 1": glass(solver_order=1),
    "UniPC": lambda: UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    "ours, order 2": glass(),
}


def timed(function: Callable[[], Any]) -> float:
    """Return the milliseconds that a call takes."""
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def run(scheduler: Any, x: Tensor, outputs: list[Tensor], calls: int) -> list[float]:
    """Step through a run; return the milliseconds of each call."""
    scheduler.set_timesteps(calls)
    taken = []
    for i, t in enumerate(scheduler.timesteps):
        start = time.perf_counter()
        x = scheduler.step(outputs[i % len(outputs)], t, x, return_dict=False)[0]
        taken.append(1000 * (time.perf_counter() - start))
    return taken


def held(scheduler: Any, shape: tuple[int, ...], given: list[Tensor]) -> int:
    """Return how many tensors of the latents' size are alive that were not given."""
    gc.collect()
    tensors = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and one.shape == shape)
    others = {one.untyped_storage().data_ptr() for one in tensors} - {one.untyped_storage().data_ptr() for one in given}
    return len(others)


def least_and_median(values: list[float]) -> list[float]:
    return [min(values), statistics.median(values)]


def shown(values: list[float]) -> str:
    return " / ".join(f"{value:.2g}" if value < 10 else f"{value:.0f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--calls", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)

    for shape in SHAPES:
        given = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        calls: dict[str, list[list[float]]] = {name: [] for name in SCHEDULERS}
        kept: dict[str, int] = {}
        for _ in range(args.runs):
            for name, make in SCHEDULERS.items():
                scheduler = make()
                calls[name].append(run(scheduler, given[0], given[1:], args.calls))
                kept[name] = held(scheduler, shape, given)
        noise = least_and_median([timed(lambda shape=shape: torch.randn(shape)) for _ in range(args.runs)])
        print(f"\n{shape}: ms, least / median of {args.runs} runs; noise for a boundary takes {shown(noise)}\n")
        print("| | step | × FlowMatchEuler | all calls | × FlowMatchEuler | held |\n|---|---|---|---|---|---|")
        native: list[list[float]] = []
        for name in SCHEDULERS:
            each = [least_and_median(list(taken)) for taken in zip(*calls[name], strict=True)]
            columns = [list(map(over, zip(*each, strict=True))) for over in (statistics.median, statistics.mean)]
            native = native or columns
            cells = [
                text
                for column, base in zip(columns, native, strict=True)
                for text in (shown(column), shown([one / other for one, other in zip(column, base, strict=True)]))
            ]
            print(f"| {name} | {' | '.join(cells)} | {kept[name]} |")

    print("\n| | set_timesteps(1000), ms |\n|---|---|")
    for name, make in SCHEDULERS.items():
        scheduler = make()
        times = [timed(lambda scheduler=scheduler: scheduler.set_timesteps(1000)) for _ in range(args.runs)]
        print(f"| {name} | {shown(least_and_median(times))} |")


if __name__ == "__main__":
    main()
