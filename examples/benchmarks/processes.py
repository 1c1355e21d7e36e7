"""What it costs to share a population: seconds, efficiency and bytes for 1 to 4 processes.

    python examples/benchmarks/processes.py

The network sleeps 190 ms for each particle, as long as FLUX.1 takes for 1024 × 1024 on an H100, the decoder 80 ms, and
latents are as large as FLUX's in bfloat16 (0.5 MB): so the table shows what sharing itself costs, on any machine.
Strong scaling shares 16 particles among more processes, weak scaling gives each 8. Efficiency is the time that one
process takes for a particle, over the time that W take for it, over W.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from glassflows import FeynmanKacSteerer

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

CALL: dict[str, Any] = {"height": 256, "width": 512, "num_inference_steps": 10}  # 8192 tokens of 16 channels, float32
NETWORK, DECODER = 0.19, 0.08  # seconds for each particle


def steered(particles: int) -> tuple[float, Any]:
    """Return the seconds of a steered run of a small FLUX that sleeps, and its ledger."""
    import tiny

    pipe = tiny.flux()

    def network(hidden_states: Tensor, **rest: Any) -> tuple[Tensor]:
        time.sleep(NETWORK * len(hidden_states))
        return (-0.5 * hidden_states,)

    def decoder(latents: Tensor) -> Tensor:
        time.sleep(DECODER * len(latents))
        return latents.float().mean((1, 2))[:, None, None, None].expand(-1, 3, 8, 8)

    pipe.transformer.forward = network
    pipe.set_progress_bar_config(disable=True)
    steer = FeynmanKacSteerer(pipe, lambda images, prompts: images.flatten(1).mean(1), particles, decode=decoder)
    source = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    out = steer("a cat", generator=source, output_type="latent", **CALL)
    return time.perf_counter() - start, out.ledger


def member(rank: int, size: int, path: str, particles: int, results: Any) -> None:
    """Be one of several processes; the first tells what a run took."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    steered(size)  # a first run makes connections
    seconds, ledger = steered(particles)
    if rank == 0:
        results.put((seconds, ledger.received))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def run(size: int, particles: int) -> tuple[float, int]:
    """Return seconds and bytes received of a run on several processes."""
    results = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(member, (size, f"{folder}/group", particles, results), nprocs=size)
        return results.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 3, 4])
    args = parser.parse_args()
    print("| | processes | particles | seconds | efficiency | MB received by each |\n|---|---|---|---|---|---|")
    for name, particles in (("strong", lambda size: 16), ("weak", lambda size: 8 * size)):
        first = None
        for size in args.sizes:
            number = particles(size)
            seconds, received = run(size, number)
            first = first or seconds / number
            efficiency = first * number / (size * seconds)
            print(
                f"| {name} | {size} | {number} | {seconds:.2f} | {efficiency:.3f} | {received / 1e6:.0f} |", flush=True
            )


if __name__ == "__main__":
    main()
