"""What each option of steering is worth on the scenes, at equal network calls.

Prompts are the choosing half of steering.py's, on which nothing is reported. Differences are paired by prompt
and seed to the best of 8 two-step ODE samples, with their standard errors over prompts. About 15 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from steering import prompts_of, with_error

from glassflows import BeamSearch, BestOfN, FeynmanKac, Halving, Steerer, SteeringResult
from scenes import CALL, load_pipeline, load_reward
from scenes.grammar import training_prompts
from scenes.verifier import verdicts

CALLS, PARTICLES = 20, 8
LATE = FeynmanKac(reward_scale=2.0)


def calibrated(pipe: Any, reward: Any, strategy: FeynmanKac, **options: Any) -> FeynmanKac:
    """Return a strategy with a calibration on training prompts."""
    steerer = Steerer(pipe, reward, strategy, PARTICLES, num_transitions=5, **options)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": CALLS, "generator": generator, **CALL}
    calibration = steerer.calibrate(training_prompts(32), apply=False, **options)
    print(calibration, file=sys.stderr, flush=True)
    return replace(strategy, calibration=calibration)


def methods(pipe: Any, reward: Any) -> dict[str, tuple[Steerer, int]]:
    """Return steerers by name, with the calls of each particle."""

    def steerer(strategy: Any, calls: int = CALLS, **options: Any) -> tuple[Steerer, int]:
        options = {"num_transitions": 5} | options
        made = Steerer(pipe, reward, strategy, PARTICLES, **options)
        return made, calls

    def narrowing(strategy: Any, **options: Any) -> tuple[Steerer, int]:
        made = Steerer(pipe, reward, strategy, strategy.widths[0], **options)
        return made.for_budget(CALLS, network_calls=PARTICLES * CALLS), CALLS

    plain = FeynmanKac(start=0.0)
    judged = calibrated(pipe, reward, plain)
    return {
        "best of 8 (`BestOfN`)": steerer(BestOfN(), num_transitions=1),
        "best of 16 at 10 calls": (Steerer(pipe, reward, BestOfN(), 16, num_transitions=1), 10),
        "`BeamSearch(2)`": steerer(BeamSearch(2)),
        "`Halving`, widths 4 : 2 : 1": narrowing(Halving((4, 2, 1))),
        "`FeynmanKac(start=0)`": steerer(plain),
        "`calibration=`": steerer(judged),
        "`twist=0.5`": steerer(plain, twist=0.5),
        "`calibration=`, `twist=0.5`": steerer(judged, twist=0.5),
        "`look_ahead=1`, 16 calls": steerer(plain, 16, look_ahead=1),
        "`look_ahead=3`, 8 calls": steerer(plain, 8, look_ahead=3),
        "`widths`, 4 : 2 : 1": narrowing(replace(plain, widths=(4, 2, 1))),
        "`FeynmanKac()`, which is `start=0.5`": steerer(FeynmanKac()),
        "`reward_scale=1`": steerer(FeynmanKac(reward_scale=1.0)),
        "`reward_scale=2`": steerer(LATE),
        "the same, `twist=0.5`": steerer(LATE, twist=0.5),
        "the same, `twist=1`": steerer(LATE, twist=1.0),
        "the same, `twist=0.5`, `ess_threshold=0.25`": steerer(replace(LATE, ess_threshold=0.25), twist=0.5),
        "the same, `twist=0.5`, 10 transitions": steerer(LATE, twist=0.5, num_transitions=10),
        "the same, `look_ahead=3`, 14 calls": steerer(LATE, 14, look_ahead=3),
        "the same, `widths`, 2 : 1, `twist=0.5`": narrowing(replace(LATE, widths=(2, 1)), twist=0.5),
    }


def measured(out: SteeringResult, prompts: list[str]) -> dict[str, np.ndarray]:
    """Return what a result is judged by, for each prompt."""
    each = out.order.shape[1]
    right = verdicts(out.images.numpy(), [prompt for prompt in prompts for _ in range(each)])
    right = 100.0 * np.asarray(right).reshape(-1, each)
    return {
        "reward": out.rewards.amax(1).numpy(),
        "right": right[:, 0],
        "all right": right.mean(1),
        "lineages": out.lineages.double().numpy(),
        "diversity": out.diversity.numpy(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default="", help="methods whose name holds this; the first is always run")
    args = parser.parse_args()
    pipe, reward, prompts = load_pipeline(), load_reward(), prompts_of("choose")[: args.prompts]
    print(f"{len(prompts)} prompts, {args.seeds} seeds\n")
    print(
        "| | network calls | reward calls | reward of the best | Δ | right, % | all right, % | lineages | diversity |"
    )
    print("|---" * 9 + "|")
    base: dict[str, np.ndarray] = {}
    for name, (steerer, calls) in methods(pipe, reward).items():
        if base and args.only not in name:
            continue
        call = {"num_inference_steps": calls, "output_type": "pt", **CALL}
        outs = [steerer(prompts, generator=torch.Generator().manual_seed(seed), **call) for seed in range(args.seeds)]
        runs = [measured(out, prompts) for out in outs]
        values = {key: np.mean([run[key] for run in runs], 0) for key in runs[0]}
        base = base or values
        difference = with_error(values["reward"] - base["reward"], "+.2f")
        ledger = outs[0].ledger
        spent = ledger.network_calls / len(prompts), ledger.reward_calls / len(prompts)
        print(
            f"| {name} | {spent[0]:.0f} | {spent[1]:.0f} | {values['reward'].mean():.2f} | {difference} | "
            f"{values['right'].mean():.0f} | {values['all right'].mean():.0f} | "
            f"{values['lineages'].mean():.1f} | {values['diversity'].mean():.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
