"""The rows that paper.py writes, and the table and the figure that it makes of them.

A row is what a method drew for a prompt with a seed, a line of JSON. Each process has a file of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
ByPrompt = dict[int, float]
COLUMNS = {"reward": "reward of the best", "mean": "mean of all", "right": "right, %", "all right": "all right, %"}
COSTS = ("network_calls", "reward_calls", "seconds", "lineages", "diversity")


def read(folder: Path) -> list[Row]:
    """Return all rows of a folder; the last line of a file may be cut off."""
    rows = []
    for path in sorted(folder.glob("rows-*.jsonl")):
        *lines, rest = path.read_text().split("\n")
        rows += [json.loads(line) for line in lines]
        rows += _whole(rest)
    return rows


def _whole(line: str) -> list[Row]:
    try:
        return [json.loads(line)]
    except json.JSONDecodeError:
        return []


def mend(path: Path) -> None:
    """Take off a last line that is cut off, so that rows can be appended."""
    if path.exists():
        *lines, rest = path.read_text().split("\n")
        lines += [rest] if _whole(rest) else []
        path.write_text("".join(f"{line}\n" for line in lines))


def by_prompt(rows: Iterable[Row], method: str, name: str) -> ByPrompt:
    """Return a value of each prompt, the mean over seeds; of a method, without prompts that lack it."""
    found: dict[int, list[float]] = {}
    for row in rows:
        value = row["seconds"]["total"] if name == "seconds" else row[name]
        if row["method"] == method and value is not None:
            found.setdefault(row["index"], []).append(100.0 * value if "right" in name else float(value))
    return {index: float(np.mean(values)) for index, values in found.items()}


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Return mean and standard error; NaN for what is too few."""
    array = np.array(list(values))
    mean = array.mean() if len(array) else np.nan
    return float(mean), float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else np.nan


def _written(values: Iterable[float], sign: str = "") -> str:
    """Return mean ± standard error with two digits of the error; without what is not known."""
    mean, error = mean_and_error(values)
    places = max(0, 1 - int(np.floor(np.log10(error)))) if error > 0 else 2
    if np.isnan(mean):
        return ""
    return f"{mean:{sign}.{places}f}" + ("" if np.isnan(error) else f" ± {error:.{places}f}")


def table(rows: list[Row], titles: dict[str, str], base: str = "best") -> str:
    """Return a table of mean ± standard error over prompts; Δ is paired to the method `base`."""
    names = {name: title for name, title in COLUMNS.items() if any(row[name] is not None for row in rows)}
    head = ["method", *(part for title in names.values() for part in (title, "Δ")), *COSTS, "prompts"]
    head = [one.replace("_", " ") for one in head]
    lines = [head, ["---"] * len(head)]
    for method, title in titles.items():
        cells = [title]
        for name in names:
            own, other = by_prompt(rows, method, name), by_prompt(rows, base, name)
            cells += [_written(own.values()), _written((own[i] - other[i] for i in own.keys() & other.keys()), "+")]
        spent = [mean_and_error(by_prompt(rows, method, name).values())[0] for name in COSTS]
        cells += [f"{value:.4g}" for value in spent]
        lines.append([*cells, str(len(by_prompt(rows, method, "reward")))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def table_of_tags(rows: list[Row], titles: dict[str, str]) -> str:
    """Return how many of the best images are right, of each tag, and the mean of the tags, which is GenEval's score."""
    tags = list(dict.fromkeys(row["tag"] for row in rows if row["right"] is not None and row["tag"]))
    if not tags:
        return ""
    lines = [["right, %", *tags, "mean"], ["---"] * (len(tags) + 2)]
    for method, title in titles.items():
        right = [by_prompt([row for row in rows if row["tag"] == tag], method, "right") for tag in tags]
        means = [mean_and_error(one.values())[0] for one in right]
        lines.append([title, *(f"{mean:.1f}" for mean in [*means, np.mean(means)])])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figure(rows: list[Row], titles: dict[str, str], path: Path) -> None:
    """Draw reward and right images of each method, with standard errors over prompts."""
    from matplotlib.figure import Figure

    names = [name for name in ("reward", "right") if any(row[name] is not None for row in rows)]
    drawn = Figure(figsize=(1.5 + 3.5 * len(names), 1 + 0.35 * len(titles)), layout="constrained")
    axes = np.atleast_1d(drawn.subplots(1, len(names), sharey=True))
    for axis, name in zip(axes, names, strict=True):
        points = [mean_and_error(by_prompt(rows, method, name).values()) for method in titles]
        for place, (mean, error) in enumerate(points):
            axis.errorbar(mean, place, xerr=np.nan_to_num(error), fmt="o", color="C0", capsize=3)
        axis.set(xlabel=COLUMNS[name], yticks=range(len(titles)))
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(titles)), list(titles.values()))
    axes[0].invert_yaxis()
    drawn.savefig(path, dpi=110)
