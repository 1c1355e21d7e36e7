"""Does an adaptive noise correlation beat a constant one? (docs/solvers.md)

Distance to the true law (energy distance × 1000, of CLIP features for the scenes) with K = 5 transitions, and
Feynman-Kac steering on the scenes: reward of the best of 8 particles, mean reward of all, right answers. About 10
minutes on 2 cores; `--scenes 0` does the mixture alone in seconds.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from problems import Scenes, cloud
from transitions import chain

from glassflows import renewal
from scenes.distance import energy_distance
from scenes.grammar import hard_prompts
from scenes.methods import Spending, feynman_kac, steered
from scenes.verifier import verdicts

RULES: dict[str, Any] = {
    "ddpm": "ddpm",
    "0": 0.0,
    "0.4": 0.4,
    "renewal(0.5)": renewal(0.5),
    "renewal(0.75)": renewal(0.75),
}
CALLS = (10, 20, 40)


def distances(problem, number: int, seed: int, rule: Any) -> list[float]:
    generator = torch.Generator().manual_seed(1000 + seed)
    true = problem.features(problem.truth(number, generator, repeats=4))
    denoiser, x = problem.denoiser(number), problem.noise(number, generator)
    method = chain(5, correlation=rule)
    return [
        1000
        * energy_distance(
            problem.features(method(denoiser, x, problem.times(n), torch.Generator().manual_seed(seed))), true
        )
        for n in CALLS
    ]


def steering(scenes: Scenes, seed: int, rule: Any) -> list[float]:
    prompts, method = hard_prompts(32), steered(feynman_kac(), scheduler={"correlation": rule})
    drawn = method(scenes.pipe, scenes.reward, prompts, Spending(160, 20), seed)
    right = verdicts(drawn.images[:, 0], prompts)
    return [drawn.rewards[:, 0].mean(), drawn.rewards.mean(), 100 * right.mean()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=64, help="samples of the scenes model; 0 leaves it out")
    args = parser.parse_args()
    scenes = Scenes() if args.scenes else None
    head = [f"{name}, {n}" for name in ("mixture", *(["scenes"] if scenes else [])) for n in CALLS]
    head += ["best reward", "mean reward", "right, %"] if scenes else []
    print("| ρ | " + " | ".join(head) + " |\n|" + "---|" * (len(head) + 1))
    for name, rule in RULES.items():
        rows = []
        for seed in range(args.seeds):
            rows.append(distances(cloud(), 2000, seed, rule))
            if scenes:
                rows[-1] += distances(scenes, args.scenes, seed, rule) + steering(scenes, seed, rule)
        cells = [f"{m:.1f} ± {s:.1f}" for m, s in zip(np.mean(rows, 0), np.std(rows, 0, ddof=1), strict=True)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
