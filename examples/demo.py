"""Steer the embedded text-to-image pipeline, side by side with plain sampling: `make demo`.

For a handful of prompts whose combination of objects the model never saw, draw one ODE image, the best of 8, and two
steered populations of 8, at equal network calls per particle. Prints a table and writes a contact sheet to demo.png.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

from scenes import CALL, load_pipeline, load_reward
from scenes.grammar import held_out_prompts
from scenes.methods import Drawn, methods
from scenes.verifier import verdicts

SHOWN = ("ODE, one image", "ODE, best of 8", "FK, GLASS", "FK, GLASS, late and twisted")
RIGHT, WRONG = "#1a7f37", "#c62828"


def contact_sheet(prompts: list[str], drawn: dict[str, Drawn], calls: int, path: Path) -> None:
    """Write one picture: a row per prompt, a column per method, a mark for right or wrong under each image."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(prompts), len(drawn), figsize=(1.9 * len(drawn) + 2.6, 2.02 * len(prompts) + 1.3))
    figure.suptitle(
        "Steering a small FLUX by CLIP score: prompts it never saw in training", fontsize=13, fontweight="bold", y=0.99
    )
    for j, (name, run) in enumerate(drawn.items()):
        right = verdicts(run.images, prompts)
        axes[0, j].set_title(f"{name}\n{right.sum()} of {len(prompts)} right", fontsize=10, pad=8)
        for i, ok in enumerate(right):
            axis, colour = axes[i, j], RIGHT if ok else WRONG
            axis.imshow(run.images[i].transpose(1, 2, 0), interpolation="bicubic")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(f"{'✓' if ok else '✗'}  score {run.rewards[i]:.1f}", color=colour, fontsize=9, labelpad=3)
            for spine in axis.spines.values():
                spine.set(color=colour, linewidth=2.5)
    for i, prompt in enumerate(prompts):
        words = prompt.split()
        text = " ".join(words[:3]) + ("\n" + " ".join(words[3:]) if len(words) > 3 else "")
        axes[i, 0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=10, labelpad=12)
    figure.text(
        0.5, 0.004,
        f"{calls} network calls per particle, 8 particles (one image: 1). The score steers; ✓ and ✗ are given by an "
        "independent rule-based verifier.",
        ha="center", fontsize=8, color="#555555",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.015, 1, 0.985))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--calls", type=int, default=20, help="network calls per particle")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo.png"))
    args = parser.parse_args()

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    print("loading the pipeline and its CLIP …", flush=True)
    pipe, reward = load_pipeline(), load_reward()
    prompts = held_out_prompts(args.prompts, seed=3)
    drawn, rows = {}, []
    for number, name in enumerate(SHOWN, 1):
        print(f"[{number}/{len(SHOWN)}] {name} …", end=" ", flush=True)
        start = time.perf_counter()
        run = methods(8)[name](pipe, reward, prompts, args.calls, torch.Generator().manual_seed(args.seed), CALL)
        seconds = time.perf_counter() - start
        right = verdicts(run.images, prompts)
        print(f"{seconds:.1f} s", flush=True)
        drawn[name] = run
        rows.append((name, float(np.mean(run.rewards)), f"{right.sum()} of {len(right)}", run.calls, seconds))

    print(f"\n{'method':30}{'CLIP score':>11}{'right':>9}{'calls per prompt':>18}{'seconds':>9}")
    for name, score, verdict, calls, seconds in rows:
        print(f"{name:30}{score:11.2f}{verdict:>9}{calls:18d}{seconds:9.1f}")
    contact_sheet(prompts, drawn, args.calls, args.out)
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
