"""Steer the embedded text-to-image pipeline, side by side with plain sampling: `make demo`.

Six prompts of four objects, whose combination the model never saw: one ODE image of each, then the best of what four
methods draw at equal network calls, each spending them as it chose on other prompts (benchmarks/steering.py). Prints a
table and writes a contact sheet to demo.png. Prompts and seed were fixed before anything was looked at.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from scenes import load_pipeline, load_reward, quiet
from scenes.grammar import hard_prompts
from scenes.methods import SHOWN, Population
from scenes.verifier import verdicts

RIGHT, WRONG = "#1a7f37", "#c62828"


def contact_sheet(prompts: list[str], drawn: dict[str, Population], path: Path) -> None:
    """Write one picture: a row per prompt, a column per method, a mark for right or wrong under each image."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(prompts), len(drawn), figsize=(1.9 * len(drawn) + 2.6, 2.02 * len(prompts) + 1.3))
    figure.suptitle(
        "Steering a small FLUX by CLIP score: prompts it never saw in training", fontsize=13, fontweight="bold", y=0.99
    )
    for j, (name, run) in enumerate(drawn.items()):
        best, right = run.images[:, 0], verdicts(run.images[:, 0], prompts)
        axes[0, j].set_title(
            f"{name}\n{run.calls:.0f} calls: {right.sum()} of {len(prompts)} right", fontsize=9.5, pad=8
        )
        for i, ok in enumerate(right):
            axis, colour = axes[i, j], RIGHT if ok else WRONG
            axis.imshow(best[i].transpose(1, 2, 0), interpolation="bicubic")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(
                f"{'✓' if ok else '✗'}  score {run.rewards[i, 0]:.1f}", color=colour, fontsize=9, labelpad=3
            )
            for spine in axis.spines.values():
                spine.set(color=colour, linewidth=2.5)
    for i, prompt in enumerate(prompts):
        axes[i, 0].set_ylabel(textwrap.fill(prompt, 24), rotation=0, ha="right", va="center", fontsize=10, labelpad=12)
    figure.text(
        0.5, 0.004,
        "The best of all that a method draws, by CLIP score. The score steers; ✓ and ✗ are given by an independent "
        "rule-based verifier.",
        ha="center", fontsize=8, color="#555555",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.015, 1, 0.985))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo.png"))
    args = parser.parse_args()

    quiet()
    print("loading the pipeline and its CLIP …", flush=True)
    pipe, reward, prompts = load_pipeline(), load_reward(), hard_prompts(args.prompts, seed=3)
    drawn: dict[str, Population] = {}
    for number, (name, (method, spending)) in enumerate(SHOWN.items(), 1):
        print(f"[{number}/{len(SHOWN)}] {name} …", end=" ", flush=True)
        drawn[name] = method(pipe, reward, prompts, spending, args.seed)
        print(f"{drawn[name].seconds:.1f} s", flush=True)

    print(f"\n{'method':28}{'CLIP score':>11}{'right':>9}{'calls per prompt':>18}{'seconds':>9}")
    for name, run in drawn.items():
        right = f"{verdicts(run.images[:, 0], prompts).sum()} of {len(prompts)}"
        print(f"{name:28}{run.rewards[:, 0].mean():11.2f}{right:>9}{run.calls:18.0f}{run.seconds:9.1f}")
    contact_sheet(prompts, drawn, args.out)
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
