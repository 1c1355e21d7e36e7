"""Several steerers on the same prompts, side by side: the loop that everyone writes."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .display import image_tag
from .optional import needing_matplotlib
from .result import SteeringResult
from .scorer import Reward
from .steerer import Steerer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = (
    "",
    "particles",
    "network calls",
    "reward calls",
    "seconds",
    "reward",
    "lineages",
    "diversity",
)
_SIDE = 160  # pixels of a picture in a notebook


def compare(
    steerers: Mapping[str, Steerer],
    prompts: str | Sequence[str],
    *,
    network_calls: int | None = None,
    judges: Mapping[str, Reward] | None = None,
    **call: Any,
) -> Comparison:
    """Run steerers on the same prompts, and put the best of each side by side.

    Every steerer is called with the same arguments and, if there are some, with generators in the
    same state, which are left as they were.

    Args:
        steerers: Steerers by name. Differences are to the first.
        prompts: The prompts.
        network_calls: Calls that each may spend on a prompt: each has as many particles as these
            pay for (`for_budget`). None runs the steerers as they are.
        judges: Further rewards by name, which score the best images and steer nothing. What a
            method is steered by it may exploit.
        call: The keyword arguments of a call, `num_inference_steps` among them if there are
            `network_calls`.

    Raises:
        ValueError: if there is no steerer, or the calls do not pay for two particles.
        TypeError: for `select`, `num_images_per_prompt` or `return_dict`.

    Example:
        compare(
            {"best of N": Steerer(pipe, reward, BestOfN()), "steered": Steerer(pipe, reward)},
            prompts,
            network_calls=160,
            num_inference_steps=20,
        )
    """
    if not isinstance(steerers, Mapping) or not steerers:
        raise ValueError(
            f'steerers: expected some by name, {{"steered": Steerer(…), …}}, got {steerers!r}'
        )
    judges = judges or {}
    if taken := {*_COLUMNS} & judges.keys():
        raise ValueError(f"judges: expected other names than {', '.join(sorted(taken))}: rename it")
    fixed = {"select", "num_images_per_prompt", "return_dict", "prompt"} & call.keys()
    if fixed:
        raise TypeError(f"{', '.join(sorted(fixed))}: expected no such argument: the best is shown")
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    if network_calls is not None:
        steps = call.get("num_inference_steps")
        if steps is None:
            raise ValueError(
                "num_inference_steps: expected a number beside network_calls, got none: name it"
            )
        steerers = {
            name: steer.for_budget(steps, network_calls=network_calls)
            for name, steer in steerers.items()
        }
    results = {
        name: steer(listed, select="best", **call | _as_it_is(call.get("generator")))
        for name, steer in steerers.items()
    }
    judged = {
        name: {judge: _judged(judge, reward, result) for judge, reward in judges.items()}
        for name, result in results.items()
    }
    return Comparison(results, judged)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What steerers drew of the same prompts.

    Args:
        results: The result of each.
        judged: Scores of each one's best images by judge, shape (P,).
    """

    results: dict[str, SteeringResult]
    judged: dict[str, dict[str, Tensor]]

    def __getitem__(self, name: str) -> SteeringResult:
        return self.results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    @property
    def rows(self) -> list[dict[str, float | str]]:
        """The table: of each steerer its name, costs for each prompt, and means over prompts.

        "Δ" is the mean difference to the first, "±" the standard error of what stands before it,
        over prompts; NaN for one prompt.
        """
        first = next(iter(self))
        rows = []
        for name, result in self.results.items():
            number, ledger = len(result.rewards), result.ledger
            row: dict[str, float | str] = {
                "": name,
                "particles": float(result.widths[0]),
                "network calls": ledger.network_calls / number,
                "reward calls": ledger.reward_calls / number,
                "seconds": ledger.seconds["total"] / number,
            }
            for measure, scores in self._scores(name).items():
                gains = scores - self._scores(first)[measure]
                row |= {measure: float(scores.mean()), f"{measure} Δ": float(gains.mean())}
                row[f"{measure} Δ ±"] = (
                    float(gains.std()) / math.sqrt(number) if number > 1 else math.nan
                )
            row["lineages"] = float(result.lineages.double().mean())
            row["diversity"] = float(result.diversity.mean())
            rows.append(row)
        return rows

    def _scores(self, name: str) -> dict[str, Tensor]:
        """Return the reward of the best and what judges say of it, shape (P,) each."""
        return {"reward": self[name].image_rewards.cpu(), **self.judged[name]}

    def _table(self) -> list[list[str]]:
        """Return the names of the columns, then the entries of each row, as texts."""
        rows = self.rows
        names = [name for name in rows[0] if not name.endswith("±")]
        return [names, *([_cell(row, name) for name in names] for row in rows)]

    def __str__(self) -> str:
        """Return the table as markdown."""
        table = self._table()
        names, *rows = (f"| {' | '.join(cells)} |" for cells in table)
        return "\n".join([names, "|---" * len(table[0]) + "|", *rows])

    __repr__ = __str__

    def plot(self) -> Figure:
        """Draw the contact sheet as a matplotlib figure: a row for each prompt, a column for each.

        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: if the results hold no images.
        """
        with needing_matplotlib():
            from .plotting import contact_sheet
        return contact_sheet(self.results)

    def _repr_html_(self) -> str:
        """Return the table and small pictures, for notebooks."""
        rows = [_html_row(map(html.escape, cells)) for cells in self._table()]
        parts = ["<table>", *rows, "</table>"]
        films = {name: result.films() for name, result in self.results.items()}
        if all(films.values()):
            parts += ["<table>", _html_row(["", *map(html.escape, films)])]
            for i, prompt in enumerate(self[next(iter(self))].prompts):
                pictures = [image_tag(some[i], _SIDE) for some in films.values() if some]
                parts.append(_html_row([html.escape(str(prompt)), *pictures]))
            parts.append("</table>")
        return "".join(parts)


def _html_row(cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _cell(row: Mapping[str, float | str], name: str) -> str:
    """Return an entry of the table as a text, a difference with its standard error."""
    value = row[name]
    if isinstance(value, str):
        return value
    error = row.get(f"{name} ±")
    if error is None:
        return f"{value:.4g}"
    return f"{value:+.3g}" + ("" if math.isnan(float(error)) else f" ± {error:.2g}")


def _as_it_is(generator: Any) -> dict[str, Any]:
    """Return the generators of a call as copies, so that the next call begins with the same."""
    if generator is None:
        return {}
    if isinstance(generator, list):
        return {"generator": [one.clone_state() for one in generator]}
    return {"generator": generator.clone_state()}


@torch.no_grad()
def _judged(judge: str, reward: Reward, result: SteeringResult) -> Tensor:
    """Return what a judge says of a result's images, bytes in [0, 1], shape (P,), float64."""
    samples = result.samples()
    images = samples.images
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    scores = torch.as_tensor(reward(images, list(samples.prompts))).cpu().double()
    if scores.shape != (len(samples),):
        raise ValueError(
            f"{judge} returned shape {tuple(scores.shape)}; expected one score per image, shape "
            f"({len(samples)},)"
        )
    return scores
