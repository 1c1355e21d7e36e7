"""Steering against best-of-N on hard held-out prompts of the scenes, at equal network calls: `make benchmark`.

The protocol has two parts. Each appends what it draws to a file of JSON lines and skips what is there, so that it can
be interrupted.

    python steering.py choose   every method chooses how to spend each budget, on the choosing half of the prompts
    python steering.py report   every method draws with what it has chosen, on the reporting half: docs/evidence.md

A budget is network calls for each prompt, which every method splits as it chooses ("160"), or particles × calls of
each ("8x20"). Choosing is by the reward of the best image, one setting after another, and is the same for all.
Differences are paired by prompt and seed; standard errors are over prompts. The verdict "right" is the rule-based
verifier's, which no method sees. `--reward rules` steers by every second criterion of the verifier and is judged by the
others. Transformer and decoder compute in bfloat16, as public models do; samplers and rewards in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import wraps
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).parents[1]))

from native import dpm_solver, euler_maruyama, native_steered
from paper_report import mean_and_error

from glassflows import BeamSearch, Halving
from scenes import load_pipeline, load_reward
from scenes.distance import distances
from scenes.grammar import hard_prompts
from scenes.methods import Method, Population, Spending, ancestral, calibrated, feynman_kac, ours, plain, steered
from scenes.verifier import RuleReward, other_verdicts, percent_right, verdicts

FOLDER = Path("out/steering")
CHOSEN = Path(__file__).with_name("steering.json")
ONE = "one image, native ODE"
BASELINE = "best of N, native ODE"
POOL = 128  # plain samples of each prompt, from which best-of-N is computed for every N
POOL_SEED = 1000
LABELS = (("reward", "same reward"), ("right", "same right, %"))
CHOOSING, REPORTING = 32, 96  # prompts
Key = tuple[str, str, Spending, int]  # half, method, spending and seed of what has been drawn


class Budget(NamedTuple):
    """Network calls for each prompt, and of each particle; None where a method may split them as it likes."""

    calls: int
    steps: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "160" or "8x20"."""
        particles, times, calls = text.partition("x")
        return cls(int(particles) * int(calls), int(calls)) if times else cls(int(text))

    def __str__(self) -> str:
        return f"{self.calls // self.steps}x{self.steps}" if self.steps else str(self.calls)

    @property
    def title(self) -> str:
        return f"{self.calls // self.steps} particles × {self.steps} calls" if self.steps else f"{self} network calls"


PLAIN = {"steps": (3, 4, 6, 8)}  # of the best of N
BUDGETS = {"clip": ("160", "8x20", "96", "320"), "rules": ("48",)}  # the first comes before the others that are split


@dataclass(frozen=True)
class Row:
    """A method and what it may choose.

    Args:
        method: Draws.
        choices: Values of each field of `Spending` to choose from, in the order in which they are chosen.
        calls_each: The fewest network calls of a transition.
    """

    method: Method
    choices: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    calls_each: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether it is best-of-N, which chooses nothing but its steps."""
        return list(self.choices) == ["steps"]

    def settings(self, spending: Spending, setting: str, values: Sequence[Any]) -> list[Spending]:
        """Return what `spending` becomes with each value of a setting; a chain has no more transitions than it can."""
        every = [replace(spending, **{setting: value}) for value in values]
        every = [replace(new, transitions=min(new.transitions, new.steps // self.calls_each)) for new in every]
        return [new for new in dict.fromkeys(every) if new.particles >= 2]


STEPS = {"steps": (4, 6, 8, 12, 20)}
CHAINS = STEPS | {"transitions": (3, 5, 8)}
SCALES = {"scale": (1.0, 3.0, 10.0)}
PUBLISHED = {"solver_order": 1, "inner_grid": "condot"}


ROWS: dict[str, Row] = {
    ONE: Row(plain()),
    BASELINE: Row(plain(), PLAIN),
    "best of N, two-step ODE": Row(plain(ours), PLAIN),
    "best of N, DPM-Solver++ 2M": Row(plain(dpm_solver("dpmsolver++")), PLAIN),
    "FK, DDPM ancestral, scored alike": Row(ancestral(alike=True), CHAINS | SCALES),
    "FK, DDPM ancestral, scored at every call": Row(ancestral(alike=False), STEPS | SCALES),
    "FK, Euler-Maruyama": Row(native_steered(euler_maruyama), CHAINS | SCALES),
    "FK, DPM-Solver++ 2M SDE": Row(native_steered(dpm_solver("sde-dpmsolver++")), CHAINS | SCALES),
    # with one call per transition GLASS is DDPM's ancestral sampling
    "FK, GLASS as published": Row(steered(feynman_kac(start=0.0), PUBLISHED), CHAINS | SCALES, calls_each=2),
    "FK, GLASS": Row(steered(feynman_kac()), CHAINS | SCALES, calls_each=2),
    "FK, calibrated": Row(calibrated(), CHAINS | SCALES),
    "FK, twisted": Row(steered(feynman_kac()), STEPS | {"twist": (0.5, 1.0)} | CHAINS | SCALES),
    "FK, look-ahead": Row(steered(feynman_kac(), look_ahead=1), CHAINS | SCALES),
    "halving": Row(steered(lambda scale: Halving((4, 2, 1))), CHAINS),
    "beam search": Row(steered(lambda scale: BeamSearch(2)), CHAINS),
}


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def prompts_of(half: str) -> list[str]:
    """Return the prompts of a half, "choose" or "report"."""
    both = hard_prompts(REPORTING + CHOOSING)
    return both[:REPORTING] if half == "report" else both[REPORTING:]


def compute_in_bfloat16(module: torch.nn.Module) -> None:
    """Let a module of float32 weights compute in bfloat16; what it takes and returns stays float32."""
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # of RMSNorm under autocast
    forward = torch.autocast("cpu", torch.bfloat16)(module.forward)

    @wraps(module.forward)
    def rounded(*args: Any, **kwargs: Any) -> Any:
        return tree_map(torch.Tensor.float, forward(*args, **kwargs))

    module.forward = rounded


class Bench:
    """The model, its reward and judge, and the file of what has been drawn.

    Args:
        reward: "clip", or "rules" for every second criterion of the verifier.
        folder: Where the JSON lines are.
    """

    def __init__(self, reward: str, folder: Path = FOLDER) -> None:
        self.pipe = load_pipeline()
        compute_in_bfloat16(self.pipe.transformer)
        compute_in_bfloat16(self.pipe.vae.decoder)
        self.reward, self.judge = (load_reward(), verdicts) if reward == "clip" else (RuleReward(), other_verdicts)
        self.rows = {name: row for name, row in ROWS.items() if reward == "clip" or "twist" not in row.choices}
        self.path, self.drawn = folder / f"{reward}.jsonl", {}
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            self._remember(json.loads(line))

    def values(self, half: str, name: str, spending: Spending, seed: int) -> dict[str, np.ndarray]:
        """Return what a method reaches on each prompt of a half, by measure; drawn unless it has been before."""
        key = half, name, spending, seed
        if key not in self.drawn:
            self._draw(key, prompts_of(half), self.measures)
        return self.drawn[key]

    def plain_pool(self, name: str, steps: int) -> dict[str, np.ndarray]:
        """Return "reward" and "right" (percent) of plain samples of the reporting half, shape (P, POOL)."""
        key = "pool", name, Spending(POOL * steps, steps), POOL_SEED
        if key not in self.drawn:
            self._draw(key, prompts_of("report"), self.pooled)
        return self.drawn[key]

    def _draw(self, key: Key, prompts: list[str], measures: Callable[[Population, list[str]], dict[str, np.ndarray]]):
        """Draw by the method of a key, and keep what is measured."""
        half, name, spending, seed = key
        population = ROWS[name].method(self.pipe, self.reward, prompts, spending, seed)
        values = {measure: np.round(value, 4).tolist() for measure, value in measures(population, prompts).items()}
        line = {"half": half, "name": name, "spending": asdict(spending), "seed": seed, "values": values}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:  # one write, so that several processes may share the file
            file.write(json.dumps(line).encode() + b"\n")
        self._remember(line)

    def _remember(self, line: dict[str, Any]) -> None:
        key = line["half"], line["name"], Spending(**line["spending"]), line["seed"]
        self.drawn[key] = {measure: np.asarray(value, float) for measure, value in line["values"].items()}

    def pooled(self, population: Population, prompts: list[str]) -> dict[str, np.ndarray]:
        """Return reward and verdict of each image, shape (P, K)."""
        return {"reward": population.rewards, "right": percent_right(self.judge, population.images, prompts)}

    def measures(self, population: Population, prompts: list[str]) -> dict[str, np.ndarray]:
        """Return each measure of a population, shape (P,)."""
        right, number = percent_right(self.judge, population.images, prompts), len(prompts)
        return {
            "reward": population.rewards[:, 0],
            "right": right[:, 0],
            "all right": right.mean(1),
            "distance": distances(self.pipe.vae, population.images, prompts),
            "lineages": population.lineages,
            "diversity": population.diversity,
            "calls": np.full(number, population.calls),
            "reward calls": np.full(number, population.reward_calls),
            "seconds": np.full(number, population.seconds / number),
        }


# ---- choosing --------------------------------------------------------------------------------------------------------


def choose(bench: Bench, name: str, budget: Budget, before: Spending | None, seeds: int) -> Spending:
    """Return how a method spends a budget: one setting after another, by the reward of the best.

    Args:
        before: What was chosen for another number of calls: steps go from there to a neighbour at most, transitions
            are chosen anew, and the rest stays.
    """
    if name == ONE:
        return Spending(20, 20)
    row, spending = bench.rows[name], replace(before or Spending(budget.calls, 12, scale=3.0), calls=budget.calls)
    for setting, values in row.choices.items():
        if setting == "steps" and before:
            onward = [one for one in values if (one - before.steps) * (budget.calls - before.calls) >= 0]
            values = sorted(onward, key=lambda one: abs(one - before.steps))[:2]
        elif setting == "steps" and budget.steps:
            values = (budget.steps,)
        elif setting != "transitions" and before:
            continue
        means = {}
        for new in row.settings(spending, setting, values):
            runs = [bench.values("choose", name, new, seed)["reward"].mean() for seed in range(seeds)]
            means[new] = float(np.mean(runs))
        if not means:
            raise ValueError(f"budgets: expected one that pays for 2 particles of each method, got {budget} ({name})")
        spending = max(means, key=means.__getitem__)
        tried = ", ".join(f"{getattr(new, setting)}: {mean:.2f}" for new, mean in means.items())
        print(f"{budget.title}, {name}, {setting}: {tried}", flush=True)
    return spending


def everything_chosen() -> dict[str, Any]:
    return json.loads(CHOSEN.read_text()) if CHOSEN.exists() else {}


def load_chosen(reward: str) -> dict[Budget, dict[str, Spending]]:
    rows = everything_chosen().get(reward, {})
    return {Budget.parse(key): {name: Spending(**one) for name, one in each.items()} for key, each in rows.items()}


def save_chosen(reward: str, budget: Budget, name: str, spending: Spending) -> None:
    everything = everything_chosen()
    everything.setdefault(reward, {}).setdefault(str(budget), {})[name] = asdict(spending)
    new = CHOSEN.with_suffix(".new")
    new.write_text(json.dumps(everything, indent=1) + "\n")
    new.replace(CHOSEN)


# ---- how many calls best-of-N needs ----------------------------------------------------------------------------------


Curves = Sequence[tuple[int, np.ndarray]]  # calls for each plain sample, and what the best of N reaches, (POOL, P)


def best_of(number: int) -> np.ndarray:
    """Return the probabilities that the best of n of `number` samples is that of each rank, shape (number, number).

    Row n − 1 is for n: C(number − 1 − rank, n − 1) / C(number, n).
    """
    n, shares = np.arange(1, number + 1), np.zeros((number, number))
    shares[:, 0] = n / number
    for rank in range(number - 1):
        shares[:, rank + 1] = shares[:, rank] * np.clip(number - rank - n, 0, None) / (number - 1 - rank)
    return shares


def pool(bench: Bench, name: str, steps: int) -> dict[str, np.ndarray]:
    """Return what best-of-N reaches on each reporting prompt for every N up to POOL, by measure, shape (POOL, P)."""
    samples = bench.plain_pool(name, steps)
    order, shares = np.argsort(-samples["reward"], axis=1, kind="stable"), best_of(POOL)
    return {measure: shares @ np.take_along_axis(value, order, 1).T for measure, value in samples.items()}


def needed(reached: np.ndarray, curves: Curves) -> float:
    """Return the fewest network calls at which best-of-N reaches a mean; infinity if no pool is large enough."""
    calls = [np.inf]
    for steps, curve in curves:
        means, target = np.maximum.accumulate(curve.mean(1)), reached.mean()
        if means[-1] >= target:
            calls.append(steps * float(np.interp(target, means, np.arange(1, POOL + 1))))
    return min(calls)


class Needed(NamedTuple):
    """The network calls with which best-of-N reaches what a method does; infinity beyond the pool."""

    calls: float
    low: float
    high: float

    def __str__(self) -> str:
        calls, low, high = (f"{one:.0f}" if np.isfinite(one) else "∞" for one in self)
        return f"{calls} ({low} to {high})"


def needed_interval(reached: np.ndarray, curves: Curves, draws: int = 500) -> Needed:
    """Return the calls best-of-N needs with their 95 % interval, by bootstrap over prompts."""
    rng = np.random.default_rng(0)
    values = []
    for _ in range(draws):
        rows = rng.integers(len(reached), size=len(reached))
        values.append(needed(reached[rows], [(steps, curve[:, rows]) for steps, curve in curves]))
    low, high = np.quantile(values, [0.025, 0.975], method="nearest")
    return Needed(needed(reached, curves), float(low), float(high))


# ---- tables ----------------------------------------------------------------------------------------------------------


def with_error(values: np.ndarray, form: str) -> str:
    """Return the mean of values (P,) of P prompts ± its standard error."""
    mean, error = mean_and_error(values)
    return f"{mean:{form}} ± {error:{form.removeprefix('+')}}"


def table(
    bench: Bench, budget: Budget, chosen: dict[str, Spending], curves: Mapping[str, Curves], seeds: int
) -> dict[str, dict[str, Needed]]:
    """Print one table: what each method reaches with a budget; return the calls that best-of-N needs, by measure."""
    runs, wanted = {}, {}
    for name in bench.rows:
        spending = chosen[name]
        drawn = [bench.values("report", name, spending, seed) for seed in range(seeds)]
        runs[name] = {measure: np.mean([run[measure] for run in drawn], 0) for measure in drawn[0]}
    base = runs[BASELINE]
    print(f"\n{len(prompts_of('report'))} prompts × {seeds} seeds, {budget.title} for each prompt\n")
    print(
        "| | particles × calls, transitions | λ | calls | reward calls | s | reward of the best | Δ | right, % | Δ "
        "| all right, % | distance | lineages | diversity | best-of-N needs, reward | right |"
    )
    print("|---" * 16 + "|")
    for name, run in runs.items():
        spending = chosen[name]
        used = f"{run['calls'].mean() / spending.steps:.0f} × {spending.steps}"
        if "transitions" in ROWS[name].choices:
            used += f", {spending.transitions}"
        if spending.twist:
            used += f", twist {spending.twist}"
        scale = f"{spending.scale * bench.reward.reward_scale:.1f}" if "scale" in ROWS[name].choices else ""
        cells = [used, scale, f"{run['calls'].mean():.0f}", f"{run['reward calls'].mean():.0f}"]
        cells += [f"{run['seconds'].mean():.2f}"]
        for measure, digits in (("reward", 2), ("right", 1)):
            cells += [f"{run[measure].mean():.{digits}f}", with_error(run[measure] - base[measure], f"+.{digits}f")]
        cells += [f"{run['all right'].mean():.1f}", f"{run['distance'].mean():.2f}"]
        cells += [f"{run['lineages'].mean():.1f}", f"{run['diversity'].mean():.3f}"]
        wanted[name] = {measure: needed_interval(run[measure], curves[measure]) for measure in curves}
        cells += [str(one) for one in wanted[name].values()]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return wanted


def plot(wanted: dict[Budget, dict[str, dict[str, Needed]]], most: float, path: Path) -> None:
    """Draw the calls that best-of-N needs: a panel for each budget, a row for each method, arrows beyond the pool."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in next(iter(wanted.values())) if name != ONE]
    size = 3.4 * len(wanted) + 2.6, 0.34 * len(names) + 1.5
    figure, axes = plt.subplots(1, len(wanted), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (budget, rows) in zip(axes[0], wanted.items(), strict=True):
        for (measure, label), shift in zip(LABELS, (-0.13, 0.13), strict=True):
            values = np.clip([rows[name][measure] for name in names], None, most)
            y, (calls, low, high) = np.arange(len(names)) + shift, values.T
            style = {"fmt": "o", "ms": 4, "lw": 1.4, "label": label}
            dots = axis.errorbar(calls, y, xerr=[calls - low, high - calls], **style)
            axis.plot(calls[calls >= most], y[calls >= most], ">", ms=7, color=dots[0].get_color())
        axis.axvline(budget.calls, color="0.5", lw=1, zorder=0)
        axis.set(title=budget.title, xscale="log", xlabel="network calls that best-of-N needs")
        axis.minorticks_off()
        axis.set_xticks(
            ticks := [50 * 2**i for i in range(8) if 50 * 2**i <= 1.1 * most], [str(tick) for tick in ticks]
        )
        axis.set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("choose", "report"))
    parser.add_argument("--reward", choices=("clip", "rules"), default="clip")
    parser.add_argument("--budgets", nargs="+", metavar="CALLS", help="such as 160, or 8x20: particles × calls")
    parser.add_argument("--seeds", type=int, help="1 for choosing, 4 for reporting")
    parser.add_argument("--methods", nargs="+", choices=ROWS, metavar="ROW", help="choose for, or draw, these alone")
    parser.add_argument("--plot", type=Path, help="where to draw what best-of-N needs")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the JSON lines")
    args = parser.parse_args()
    bench, chosen = Bench(args.reward, args.out), load_chosen(args.reward)
    budgets = [Budget.parse(text) for text in args.budgets or BUDGETS[args.reward]]
    first = Budget.parse(BUDGETS[args.reward][0])
    names = [name for name in bench.rows if not args.methods or name in args.methods]
    if args.part == "choose":
        for budget, name in product(sorted(budgets, key=lambda one: one != first), names):
            before = None if budget.steps or budget == first else load_chosen(args.reward).get(first, {}).get(name)
            if not (before or budget.steps or budget == first):
                parser.error(f"no settings for {name} at {first} in {CHOSEN.name}: choose for that budget first")
            save_chosen(args.reward, budget, name, choose(bench, name, budget, before, args.seeds or 1))
        return
    missing = [f"{name} at {budget}" for budget, name in product(budgets, names) if name not in chosen.get(budget, {})]
    if missing:
        parser.error(f"no settings in {CHOSEN.name} for {', '.join(missing)}: run `choose` for them first")
    for budget, seed, name in product(budgets, range(args.seeds or 4), names):
        bench.values("report", name, chosen[budget][name], seed)
        print(f"{budget.title}, {name}, seed {seed}: drawn", file=sys.stderr, flush=True)
    if args.methods:
        return
    split = [budget for budget in budgets if not budget.steps] or [first]
    plain_rows = {(name, chosen[budget][name].steps) for budget in split for name, row in ROWS.items() if row.is_plain}
    pools = [(steps, pool(bench, name, steps)) for name, steps in sorted(plain_rows)]
    curves = {measure: [(steps, reached[measure]) for steps, reached in pools] for measure, _ in LABELS}
    print(
        f"Best of N from pools of {POOL} samples: {', '.join(f'{name}, {n} calls' for name, n in sorted(plain_rows))}"
    )
    wanted = {budget: table(bench, budget, chosen[budget], curves, args.seeds or 4) for budget in budgets}
    if args.plot:
        plot(wanted, POOL * max(steps for steps, _ in pools), args.plot)


if __name__ == "__main__":
    main()
