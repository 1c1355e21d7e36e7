"""One prompt, many particles, many GPUs: every process has the pipeline and works on its share of the particles.

    torchrun --nproc-per-node 2 examples/many_gpus.py    # two processes of the scenes, on a CPU
    accelerate launch --num_processes 8 examples/many_gpus.py --model black-forest-labs/FLUX.1-dev --particles 64

Nothing in the steered call says so: it is shared because there is a process group. Images do not depend on the number
of processes. docs/many_gpus.md says what is exchanged, what it costs, and what happens when a process fails.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from glassflows import FeynmanKacSteerer
from scenes import CALL, load_pipeline, load_reward, quiet


def loaded(model: str | None, device: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return a pipeline on this process's device, its reward there, and what a call is given besides the prompt."""
    if model is None:
        return load_pipeline().to(device), load_reward(), CALL
    from diffusers import DiffusionPipeline

    from glassflows.rewards import PickScore

    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to(device)
    return pipe, PickScore(device=device), {"height": 1024, "width": 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a pipeline of diffusers; the scenes if it is left out")
    parser.add_argument("--prompt", default="a red circle left of a blue square and above a green triangle")
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/many_gpus"))
    args = parser.parse_args()

    quiet()
    on_cpu = not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu)  # begins the process group
    if state.num_processes == 1 and "MASTER_ADDR" in os.environ:  # several were asked for
        print("one process: accelerate leaves several on a CPU to MPI (--mpirun_hostfile); torchrun starts them")
    pipe, reward, call = loaded(args.model, state.device)
    steer = FeynmanKacSteerer(pipe, reward, args.particles, decode_batch_size=1)
    state.wait_for_everyone()
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(args.seed)
    out = steer(args.prompt, num_inference_steps=args.steps, generator=generator, select="best", **call)
    if state.is_main_process:
        out.save(args.out)
        print(f"{state.num_processes} processes, {args.particles} particles: {time.perf_counter() - start:.1f} s")
        print(f"best reward {float(out.image_rewards[0]):.2f}; {out.ledger}")
        print(f"wrote {args.out}")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
