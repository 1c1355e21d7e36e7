"""What steps, runs, steering and twists cost on a GPU, at the sizes of public models: FLUX.1, SD3.5 and Wan 2.1.

    python examples/benchmarks/gpu.py                      # at most 8 minutes on one GPU
    python examples/benchmarks/gpu.py --device cpu --toy   # the same code at toy size: proves it, measures nothing

Transformers and autoencoders have the published configurations and random weights in bfloat16, made on the device.
Embeddings stand for the text encoders, and nothing is downloaded. What matters most comes first: a row for which there
is no time is left out, and one that runs out of memory says so. docs/gpu.md says what the columns are.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import itertools
import math
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from public_models import MODELS, SMALL_VIT, UNIPC, VIT_L, Model, clip, made, parameters, toy
from torch import Tensor

from glassflows import FeynmanKacSteerer, GLASSScheduler

ROOT = Path(__file__).parents[2]
STEP = "queued, ms | done, ms | mean of all, ms | waits in the first | waits in all others"
RUN = "seconds | seconds a call | × native | peak, GiB"
STEERING = "seconds | × plain | network | decode | reward | gradient | rest | peak, GiB"
MEMORY = "peak, GiB | seconds"
Row = tuple[str, float, Callable[[], list[str]]]  # name, seconds that it may take, what measures its cells


def brightness(images: Tensor, prompts: Any) -> Tensor:
    """1000 · the mean of each image or video."""
    return 1000 * images.flatten(1).mean(1)


# ---- measuring -------------------------------------------------------------------------------------------------------


def now() -> float:
    """Return the time, in seconds, when everything queued is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def costs(function: Callable[[], Any], device: str) -> tuple[float, float, Any]:
    """Return the seconds of a call, the most memory allocated meanwhile in GiB (NaN on the CPU), and its result."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = now()
    result = function()
    seconds = now() - start
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else math.nan, result


def shown(*values: float) -> list[str]:
    return ["–" if math.isnan(value) else f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in values]


def stepped(scheduler: Any, given: list[Tensor], calls: int, device: str, count: bool = False) -> list[list[float]]:
    """Return of each step of a run: seconds until it is queued, until it is done, and waits for the GPU if counted."""
    scheduler.set_timesteps(calls, device=device)
    x, *outputs = given
    taken = []
    for i, t in enumerate(scheduler.timesteps):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if count:
                torch.cuda.set_sync_debug_mode("warn")
            start = now()
            x = scheduler.step(outputs[i % 2], t, x, return_dict=False)[0]
            queued = time.perf_counter() - start
            if count:
                torch.cuda.set_sync_debug_mode("default")
        waits = sum("called a synchronizing" in str(one.message) for one in caught)
        taken.append([queued, now() - start, waits if count else math.nan])
    return taken


def free() -> None:
    """Give the memory of a GPU back that nothing refers to."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


class Report:
    """Prints tables row by row, within a time; a row that fails leaves the others."""

    def __init__(self, minutes: float) -> None:
        self.end = time.perf_counter() + 60 * minutes
        self.failures = 0

    def left(self) -> float:
        return self.end - time.perf_counter()

    def guarded(self, seconds: float, function: Callable[[], Any]) -> Any:
        """Return what a function returns that may take some seconds, or as a string why there is nothing."""
        if self.left() < 1.2 * seconds:
            return "no time"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # rewards of random images tell nothing
                return function()
        except torch.OutOfMemoryError:
            return "out of memory"
        except Exception as error:
            traceback.print_exc()
            self.failures += 1
            return f"failed: {type(error).__name__}"
        finally:
            free()

    def table(self, title: str, columns: str, rows: Callable[[], list[Row]]) -> None:
        """Print a table of rows, in columns whose names have " | " between them."""
        listed = self.guarded(0, rows)
        if isinstance(listed, str):
            print(f"\n{title}: {listed}", flush=True)
            return
        width = columns.count("|") + 1
        print(f"\n{title}:\n\n| | {columns} |\n|{'---|' * (width + 1)}")
        for name, seconds, measure in listed:
            cells = self.guarded(seconds, measure)
            cells = [cells, *[""] * (width - 1)] if isinstance(cells, str) else cells
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


class Bench:
    """A model on a device, and what is measured of it.

    Args:
        calls: Network calls of a run.
        runs: Repetitions, of which the median is taken.
        device: "cuda" or "cpu".
        small: Whether the CLIP is a toy, too.
    """

    def __init__(self, model: Model, calls: int, runs: int, device: str, small: bool) -> None:
        torch.manual_seed(0)
        self.model, self.calls, self.runs, self.device = model, calls, runs, device
        name, config = model.scheduler
        self.native = getattr(diffusers, name)(**config)
        parts = {"transformer": made(model.transformer, device), "vae": made(model.vae, device)}
        cls = getattr(diffusers, model.pipeline)
        needed = [one.name for one in inspect.signature(cls).parameters.values() if one.default is one.empty]
        self.pipe = cls(**dict.fromkeys(needed) | parts | {"scheduler": self.native})
        self.pipe.set_progress_bar_config(disable=True)
        self.rewards = {"brightness": brightness, "CLIP": clip(SMALL_VIT if small else VIT_L, device)}
        self.embeddings = {
            one: torch.randn(1, *shape, device=device).bfloat16() for one, shape in model.embeddings.items()
        }
        seconds, _, self.latents = costs(lambda: self.run(1, num_inference_steps=2, output_type="latent"), device)
        if not self.latents.isfinite().all():
            raise ValueError(f"{model.name}: expected finite latents, got some that are not")
        self.per_call, self.native_run, self.plain_run = seconds / 2, math.nan, math.nan  # seconds

    def title(self) -> str:
        transformer, vae = parameters(self.pipe.transformer) / 1e9, parameters(self.pipe.vae) / 1e6
        call = ", ".join(f"{name} {value}" for name, value in self.model.call.items())
        return f"{self.model.name} ({transformer:.2f} B + {vae:.1f} M parameters; {call})"

    def arguments(self, rows: int, **given: Any) -> dict[str, Any]:
        """Return the arguments of a call for some prompts, which are all the same."""
        embeddings = {name: one.repeat_interleave(rows, 0) for name, one in self.embeddings.items()}
        source = torch.Generator().manual_seed(0)
        rest = {"num_inference_steps": self.calls, "generator": source, "output_type": "pt"}
        return embeddings | self.model.call | rest | given

    def run(self, rows: int, **given: Any) -> Any:
        """Return the images of a plain call."""
        return self.pipe(**self.arguments(rows, **given), return_dict=False)[0]

    def steps(self) -> list[Row]:
        """One step on the latents of all particles: FlowMatchEuler, UniPC and ours."""
        shape = (self.model.particles, *self.latents.shape[1:])
        given = [torch.randn(shape, device=self.device).to(self.latents.dtype) for _ in range(3)]
        native = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        each: dict[str, Any] = {"FlowMatchEuler": native, "UniPC": diffusers.UniPCMultistepScheduler(**UNIPC[1])}
        for order, k in itertools.product((1, 2), (1, 5)):
            ours = GLASSScheduler.from_scheduler(native, solver_order=order, num_transitions=k)
            each[f"ours, order {order}, transitions: {k}"] = ours
        each["the same, noise drawn on the device"] = on_device = GLASSScheduler.from_scheduler(native)
        on_device.set_generator(torch.Generator(self.device).manual_seed(0))
        return [(name, 0.0, partial(self.step, scheduler, given)) for name, scheduler in each.items()]

    def step(self, scheduler: Any, given: list[Tensor]) -> list[str]:
        """Return milliseconds of a step until it is queued and done, the mean of all, and how often steps wait."""
        every = [stepped(scheduler, given, self.calls, self.device) for _ in range(self.runs + 1)][1:]
        queued, done, _ = 1000 * torch.tensor(every).quantile(0.5, 0).T
        waits = [one[2] for one in stepped(scheduler, given, self.calls, self.device, self.device == "cuda")]
        return shown(float(queued.median()), float(done.median()), float(done.mean()), waits[0], sum(waits[1:]))

    def whole(self) -> list[Row]:
        """A run for one image or video: with the native scheduler, and with ours in its place."""
        ours = [GLASSScheduler.from_scheduler(self.native, num_transitions=k) for k in (1, 5)]
        each = {"native": self.native, "GLASS, transitions: 1": ours[0], "GLASS, transitions: 5": ours[1]}
        return [(name, self.runs * self.calls * self.per_call, partial(self.timed, one)) for name, one in each.items()]

    def timed(self, scheduler: Any) -> list[str]:
        """Return seconds of a run and of a call, the ratio to the native scheduler, and the peak."""
        self.pipe.scheduler = scheduler
        try:
            taken = [costs(partial(self.run, 1), self.device)[:2] for _ in range(self.runs)]
        finally:
            self.pipe.scheduler = self.native
        seconds = statistics.median(one for one, _ in taken)
        if scheduler is self.native:
            self.per_call, self.native_run = seconds / self.calls, seconds
        return shown(seconds, seconds / self.calls, seconds / self.native_run, max(peak for _, peak in taken))

    def steering(self) -> list[Row]:
        """K plain images, and as many steered ones at equal calls, a latent decoded at a time."""
        seconds = self.model.particles * self.calls * self.per_call
        rows: list[Row] = [("plain, then scored", seconds, self.plain)]
        for twist, name in itertools.product((0.0, 0.5), self.rewards):
            rows.append((f"{name}, twist {twist:g}", seconds * (1 + twist), partial(self.steered, name, twist)))
        return rows

    def plain(self) -> list[str]:
        total, peak, images = costs(partial(self.run, self.model.particles), self.device)
        scoring, _, _ = costs(lambda: brightness(images.float(), None), self.device)
        self.plain_run = total + scoring
        return shown(self.plain_run, 1.0, math.nan, math.nan, scoring, math.nan, math.nan, peak)

    def steered(self, name: str, twist: float) -> list[str]:
        """Return seconds of a run, their ratio to the plain one's, what they went to, and the peak."""
        _, peak, out = costs(partial(self.steer, name, twist, num_transitions=5), self.device)
        spent = out.ledger.seconds
        total, *parts = (spent.get(part, 0.0) for part in ("total", "network", "decode", "reward", "gradient"))
        return shown(total, total / self.plain_run, *parts, total - sum(parts), peak)

    def steer(self, name: str, twist: float, network: int | None = None, decode: int | None = 1, **options: Any) -> Any:
        calls = options.pop("calls", self.calls)
        sizes: dict[str, Any] = {"particle_batch_size": network, "decode_batch_size": decode}
        steerer = FeynmanKacSteerer(
            self.pipe, self.rewards[name], self.model.particles, twist=twist, **sizes, **options
        )
        return steerer(**self.arguments(1, num_inference_steps=calls))

    def memory(self) -> list[Row]:
        """Steering in four calls and two transitions, some particles and latents at a time."""
        seconds = 4 * self.model.particles * self.per_call
        rows: list[Row] = []
        for network, decode, twist in ((None, None, 0), (None, 1, 0), (1, 1, 0), (1, 1, 0.5), (1, None, 0.5)):
            name = f"{network or 'all'}, {decode or 'all'}, twist {twist:g}"
            rows.append((name, seconds * (1 + twist), partial(self.peak, network, decode, twist)))
        if self.pipe.vae._supports_gradient_checkpointing:
            rows.append(("1, 1, twist 0.5, checkpointing", seconds, self.checkpointed))
        return rows

    def peak(self, network: int | None, decode: int | None, twist: float) -> list[str]:
        """Return the peak of a short run in GiB, and its seconds."""
        run = partial(self.steer, "brightness", twist, network, decode, calls=4, num_transitions=2, start=0.0)
        seconds, peak, _ = costs(run, self.device)
        return shown(peak, seconds)

    def checkpointed(self) -> list[str]:
        self.pipe.vae.enable_gradient_checkpointing()
        try:
            return self.peak(1, 1, 0.5)
        finally:
            self.pipe.vae.disable_gradient_checkpointing()


def gpu_tests(report: Report) -> str:
    """Run the tests that are skipped without a GPU; return pytest's last line."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "cuda.is_available" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "gpu", *map(str, files)]
    command += ["-W", "ignore:Synchronization debug mode is a prototype"]  # torch says so once; warnings are errors
    limit = min(90.0, report.left())
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=limit, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        report.failures += 1
        return f"stopped after {limit:.0f} s"
    if done.returncode:
        report.failures += 1
        print(done.stdout, done.stderr, file=sys.stderr)
    return (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]


def measure(make: Callable[[], Bench], name: str, report: Report, seconds: float) -> None:
    """Print the tables of a model, which takes some seconds to make."""
    bench = report.guarded(seconds, make)
    if isinstance(bench, str):
        print(f"\n## {name}: {bench}", flush=True)
        return
    print(f"\n## {bench.title()}", flush=True)
    k, calls = bench.model.particles, bench.calls
    for title, columns, rows in (
        (f"One step, latents of {k}", STEP, bench.steps),
        (f"One sample, {calls} calls", RUN, bench.whole),
        (f"{k} particles, {calls} calls each", STEERING, bench.steering),
        (f"{k} particles, so many in a network and in a decoder at a time", MEMORY, bench.memory),
    ):
        report.table(title, columns, rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("No GPU: nothing measured.")
        return 0
    report = Report(args.minutes)
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    versions = ", ".join(f"{one.__name__} {one.__version__}" for one in (torch, diffusers, transformers))
    print(f"**{card}**, {versions}. Random weights, bfloat16{', toy size' * args.toy}.")
    print(f"\nTests that need a GPU: {report.guarded(10, partial(gpu_tests, report))}", flush=True)
    for name in args.models:
        model = toy(MODELS[name]) if args.toy else MODELS[name]
        make = partial(Bench, model, args.calls, args.runs, args.device, args.toy)
        measure(make, model.name, report, 0 if args.toy else 20)
        free()
    return int(report.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
