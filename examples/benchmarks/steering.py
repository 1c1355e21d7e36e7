"""Steering by the learned reward on 64 held-out prompts of the scenes: `make benchmark`, the table in README.md.

Every method draws from the same seeds and spends the same network calls per particle. A seed gives one mean over the
prompts; the table shows mean ± standard deviation over seeds, and differences to the best ODE sample paired by seed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from scenes import CALL, load_pipeline, load_reward
from scenes.grammar import held_out_prompts
from scenes.methods import methods
from scenes.verifier import RuleReward, verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--calls", type=int, default=20, help="network calls per particle")
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--reward", choices=("clip", "rules"), default="clip", help="rules: the score of the verifier")
    parser.add_argument("--only", default="", help="methods whose name holds this, beside the best of the ODE")
    args = parser.parse_args()

    pipe, reward = load_pipeline(), load_reward() if args.reward == "clip" else RuleReward()
    prompts = held_out_prompts(args.prompts)
    table: dict[str, np.ndarray] = {}
    for name, method in methods(args.particles).items():
        if args.reward == "rules" and "late" in name:  # it has no gradient, and another scale
            continue
        if args.only not in name and name != f"ODE, best of {args.particles}":
            continue
        rows, start = [], time.perf_counter()
        for seed in range(args.seeds):
            run = method(pipe, reward, prompts, args.calls, torch.Generator().manual_seed(seed), CALL)
            right = verdicts(run.images, prompts).mean()
            rows.append((run.rewards.mean(), run.population.mean(), 100 * right, run.calls, run.reward_calls))
        table[name] = np.array(rows)
        print(f"{name}: {(time.perf_counter() - start) / args.seeds:.0f} s a seed", file=sys.stderr, flush=True)

    print(f"{len(prompts)} held-out prompts, {args.calls} calls per particle, mean ± s.d. over {args.seeds} seeds\n")
    print("| method | network calls | reward calls | reward of the best | − best of the ODE | mean of all | right, % |")
    print("|---|---|---|---|---|---|---|")
    for name, rows in table.items():
        gain = rows[:, 0] - table[f"ODE, best of {args.particles}"][:, 0]
        cells = [f"{v.mean():.2f} ± {v.std(ddof=1):.2f}" for v in (rows[:, 0], gain, rows[:, 1])]
        right = f"{rows[:, 2].mean():.1f} ± {rows[:, 2].std(ddof=1):.1f}"
        spent = f"{rows[0, 3]:.0f} | {rows[0, 4]:.0f}"
        print(f"| {name} | {spent} | {cells[0]} | {cells[1]} | {cells[2]} | {right} |")


if __name__ == "__main__":
    main()
