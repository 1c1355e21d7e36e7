"""Figures of a steering run, and of a calibration (matplotlib).

A genealogy shows the particles of one prompt at each scoring, and the parent of each particle.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

from .display import labels, variety
from .strategy import worth

_WINNER, _KEPT, _LOST = "#c1440e", "#4d4d4d", "#cccccc"
_MOST = 12  # particles or rows with pictures and scores; if there are more, particles are dots
_TALLEST = 9.0  # inches


class OwnFigure(Figure):
    """A figure of its own, which pyplot does not know of and so neither keeps nor shows again."""

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        """Return the figure as PNG, for notebooks."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def genealogy(result: Any, prompt: int = 0) -> Figure:
    """Draw particles as columns and scorings as rows, the first at the top; return the figure.

    The last row holds the final samples. Where the population shrank rows have fewer particles than
    the first. Lines lead to parents: red in the lineage of the best
    sample, dark in other lineages that reached the end. The title tells how many lineages did, and
    the diversity of the final samples. Curves beside the rows show the effective sample size and
    the rewards, their mean dark and the best red, then what a composed reward is made of, of the
    same particles. With more than 12 particles or rows, particles
    are dots, brighter for better rewards, and a star marks resampling. What is best is up to the
    target: where λ_r is negative, the lowest reward.

    Args:
        result: The result of a steered call.
        prompt: Index of the prompt.
    """
    drawing = _Drawing(result, prompt)
    drawing.lines()
    drawing.pictures() if drawing.large else drawing.dots()
    drawing.axes_of_tree(result, prompt)
    drawing.curves(result.ess[:, prompt].numpy())
    drawing.title(variety(int(result.lineages[prompt]), float(result.diversity[prompt])))
    return drawing.figure


def contact_sheet(results: Mapping[str, Any]) -> Figure:
    """Draw the first image of each prompt, a row for each, by several steerers, a column for each.

    Args:
        results: The result of each steerer, which returned one image of each prompt.

    Raises:
        ValueError: if the results hold no images.
    """
    films = {name: result.films() for name, result in results.items()}
    if not all(films.values()):
        raise ValueError("plot: expected images or videos, got latents or sound: set output_type")
    first = next(iter(results.values()))
    height, width = len(first.prompts), len(results)
    figure = OwnFigure(2.0 * width + 1.6, 2.15 * height + 0.3)
    axes = figure.subplots(height, width, squeeze=False)
    for column, (name, result) in enumerate(results.items()):
        axes[0, column].set_title(name, fontsize=9)
        for axis, film, score in zip(
            axes[:, column], films[name], labels(result.image_rewards.tolist()), strict=True
        ):
            axis.imshow(np.asarray(film[len(film) // 2].convert("RGB")))
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(score, fontsize=8)
    for axis, prompt in zip(axes[:, 0], first.prompts, strict=True):
        text = textwrap.fill(str(prompt), 22)
        axis.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def calibration_curves(calibration: Any) -> Figure:
    """Draw slopes and correlations over the transitions done; bars are one standard error.

    A dashed line shows the slopes as they count.

    Args:
        calibration: What `calibrate` returned.
    """
    figure = OwnFigure(7.0, 2.8)
    left, right = figure.subplots(1, 2)
    done, every = calibration.transitions, 1 + calibration.num_transitions // 12
    bars: dict[str, Any] = {"fmt": "o-", "capsize": 3, "linewidth": 1.4, "markersize": 4}
    left.errorbar(done, calibration.slopes, calibration.slope_errors, color=_WINNER, **bars)
    hollow: dict[str, Any] = {"markerfacecolor": "white", "markersize": 4, "linewidth": 1.2}
    left.plot(done, calibration.shrunk, "o--", color=_KEPT, label="as it counts", **hollow)
    left.set_title("slope $b_k$", loc="left", fontsize=9)
    left.legend(frameon=False, fontsize=9, loc="lower right")
    errors = calibration.correlation_errors
    right.errorbar(done, calibration.correlations, errors, color=_WINNER, **bars)
    right.set_title("correlation with the final reward", loc="left", fontsize=9)
    for axes in (left, right):
        axes.axhline(0, color=_LOST, linewidth=1, zorder=1)
        axes.axhline(1, color=_LOST, linewidth=1, zorder=1)
        axes.set_xlim(done[0] - 0.5, done[-1] + 0.5)
        axes.set_xticks(done[(len(done) - 1) % every :: every])
        axes.set_xlabel(f"transitions done, of {calibration.num_transitions}", fontsize=9)
        axes.tick_params(length=0, labelsize=9)
        axes.spines[:].set_visible(False)
        axes.grid(axis="y", color="#eeeeee", zorder=0)
    return figure


class _Drawing:
    """The axes of a genealogy, and what is drawn on them.

    Args:
        result: The result of a steered call.
        prompt: Index of the prompt.

    Attributes:
        scored: Rewards of all rows, the final ones last, (rows, particles); NaN where none lived.
        parts: What a composed reward is made of, likewise, by name.
        places: Row and slot of each particle, row by row.
        large: Whether particles are pictures or scores, and not dots.
    """

    def __init__(self, result: Any, prompt: int) -> None:
        self.ancestors = result.ancestors[:, prompt].numpy()
        self.columns, width = self.ancestors.shape[1], result.rewards.shape[1]
        final = torch.full((1, self.columns), math.nan, dtype=torch.float64)
        final[0, :width] = result.rewards[prompt]
        scored = torch.cat([result.scored[:, prompt], final])
        self.scored = scored.numpy()
        composed = result.parts if len(result.parts) > 1 else {}
        self.parts = {name: part[:, prompt].numpy() for name, part in composed.items()}
        self.worth = worth(scored[:, None], result.reward_scale[prompt : prompt + 1])[:, 0].numpy()
        self.lowest, self.highest = float(np.nanmin(self.worth)), float(np.nanmax(self.worth))
        self.rows = len(self.scored)
        self.places = np.argwhere(np.isfinite(self.scored))
        self.large = max(self.rows, self.columns) <= _MOST
        self.shown = _pictures(result, prompt) if self.large else None
        self.alive = _alive(self.ancestors, np.isfinite(self.scored[-1]))
        self.winner = result.lineage(prompt)

        self.cell = 0.72 if self.large else min(0.3, 9.0 / self.columns)  # inches
        self.height = 1.3 * self.cell if self.large else min(0.3, _TALLEST / self.rows)
        width = max(self.cell * self.columns, 1.5)
        beside = [1.1, *[1.5] * (1 + len(self.parts))]
        self.figure = OwnFigure(width + 1.2 + sum(beside), self.height * self.rows + 1.15)
        self.tree, self.sizes, self.rewards, *self.others = self.figure.subplots(
            1, 1 + len(beside), width_ratios=[width, *beside], sharey=True
        )

    def colour(self, row: int, slot: int) -> str:
        """Return the colour of a particle, which tells what became of it."""
        if self.winner[row] == slot:
            return _WINNER
        return _KEPT if self.alive[row][slot] else _LOST

    def lines(self) -> None:
        """Draw a line from each particle to its parent."""
        wide = 2.2 if self.large else 1.6
        for row, parents in enumerate(self.ancestors):
            for slot, parent in enumerate(parents[parents >= 0]):
                won = self.winner[row] == parent and self.winner[row + 1] == slot
                kept = self.alive[row + 1][slot]
                colour, order = (_WINNER, 3) if won else (_KEPT, 2) if kept else (_LOST, 1)
                ends = [parent, slot], [row, row + 1]
                thin = 1.2 if self.large else 0.7
                self.tree.plot(*ends, color=colour, zorder=order, linewidth=wide if won else thin)

    def pictures(self) -> None:
        """Draw particles as pictures, or as dots where there is none, with their scores."""
        texts = labels([float(self.scored[row, slot]) for row, slot in self.places])
        size = min(9.0, 72 * self.cell / (0.7 * max(map(len, texts))))  # to fit into the cell
        for (row, slot), text in zip(self.places.tolist(), texts, strict=True):
            colour = self.colour(row, slot)
            picture = self.shown[row][slot] if self.shown else None
            if picture is None:
                self.dot(row, slot, 19.0, 3.4)
            else:
                box = OffsetImage(picture, zoom=60 * self.cell / max(picture.shape[:2]))
                frame = {"edgecolor": colour, "lw": 1.6}
                self.tree.add_artist(AnnotationBbox(box, (slot, row), pad=0.06, bboxprops=frame))
            self.tree.text(
                slot,
                row + 0.37,
                text,
                ha="center",
                va="top",
                fontsize=size,
                color="#808080" if colour == _LOST else colour,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                zorder=5,
            )

    def dots(self) -> None:
        """Draw particles as dots, all at once."""
        side = 72 * min(self.cell, self.height)  # points
        rows, slots = self.places.T
        self.dot(rows, slots, 0.72 * side, min(1.5, 0.14 * side))

    def dot(self, rows: Any, slots: Any, size: float, edge: float) -> None:
        """Draw one particle or several as dots; sizes are in points."""
        places = list(zip(np.atleast_1d(rows), np.atleast_1d(slots), strict=True))
        self.tree.scatter(
            slots,
            rows,
            s=size**2,
            facecolors=[self.shade(*place) for place in places],
            edgecolors=[self.colour(*place) for place in places],
            linewidths=edge,
            zorder=4,
        )

    def shade(self, row: int, slot: int) -> Any:
        """Return a colour that is brighter for better rewards."""
        share = (self.worth[row, slot] - self.lowest) / (self.highest - self.lowest or 1.0)
        return matplotlib.colormaps["viridis"](share)

    def axes_of_tree(self, result: Any, prompt: int) -> None:
        """Name rows and columns, as many as there is room for."""
        self.tree.set_xlim(-0.6, self.columns - 0.4)
        self.tree.set_ylim(self.rows - 0.3, -0.5)
        star = "\nresampled" if self.large else " *"
        marks = [star if one else "" for one in result.resampled[:, prompt]]
        numbered = zip(result.transitions, marks, strict=True)
        names = [*(f"transition {k + 1}{mark}" for k, mark in numbered), "final"]
        every = max(1, round(0.2 / self.height))
        rows = [*range(0, self.rows - every, every), self.rows - 1]
        self.tree.set_yticks(rows, [names[row] for row in rows])
        columns = range(0, self.columns, 1 if self.large else 1 + self.columns // 10)
        self.tree.set_xticks(columns, [str(slot + 1) for slot in columns])
        self.tree.set_xlabel("particle")
        self._plain(self.tree, "y")

    def title(self, text: str) -> None:
        """Write a line above the particles, from the left."""
        self.tree.set_title(text, loc="left", fontsize=9)

    def curves(self, ess: np.ndarray) -> None:
        """Draw effective sample sizes and rewards beside the rows."""
        line: dict[str, Any] = {"marker": "o", "markersize": min(4.0, 20 * self.height)}
        rows = range(self.rows)
        self.sizes.plot(ess, rows[:-1], color=_KEPT, **line)
        self.sizes.set_xlim(0, self.columns * 1.05)
        self.sizes.set_xticks([0, self.columns // 2, self.columns][:: 1 if self.columns > 1 else 2])
        self.sizes.set_xlabel("effective\nsample size")
        slots = np.nanargmax(self.worth, 1)
        named = {"reward": self.scored, **self.parts}
        for axes, (name, scores) in zip((self.rewards, *self.others), named.items(), strict=True):
            best, mean = scores[rows, slots], np.nanmean(scores, 1)
            axes.plot(mean, rows, color=_KEPT, **line)
            axes.plot(best, rows, color=_WINNER, **line)
            ends = sorted({float(end) for ends in (mean, best) for end in (ends.min(), ends.max())})
            _name_ends(axes, [ends[0], ends[-1]] if len(ends) > 1 else ends)
            axes.set_xlabel(f"{textwrap.fill(name, 20)}:\nmean, best")
        for axes in (self.sizes, self.rewards, *self.others):
            self._plain(axes, "x")

    def _plain(self, axes: Any, grid: str) -> None:
        axes.tick_params(length=0, labelsize=9)
        axes.xaxis.label.set_size(9)
        axes.spines[:].set_visible(False)
        axes.grid(axis=grid, color="#eeeeee", zorder=0)


def _name_ends(axes: Any, ends: Sequence[float]) -> None:
    """Name the two ends of an axis in full, one below the other where they are long."""
    texts = labels(ends)
    if sum(map(len, texts)) > 14:
        texts[1:] = [f"\n{text}" for text in texts[1:]]
    axes.set_xticks(ends, texts)
    sides = ("left", "right") if len(ends) > 1 else ("center",)
    for text, side in zip(axes.get_xticklabels(), sides, strict=False):
        text.set_horizontalalignment(side)


def _alive(ancestors: np.ndarray, final: np.ndarray) -> list[np.ndarray]:
    """Return, row by row, which slots have descendants among the final samples.

    Args:
        ancestors: Parent slots of each row but the first, shape (rows, particles).
        final: Which slots hold a final sample, shape (particles,), bool.
    """
    alive = [final]
    for parents in ancestors[::-1]:
        kept = np.zeros(len(final), bool)
        kept[parents[alive[0]]] = True
        alive.insert(0, kept)
    return alive


def _pictures(result: Any, prompt: int) -> list[list[Any]] | None:
    """Return the previews and final samples of a prompt, row by row, (H, W, 3) each.

    Videos are shown by the frame in the middle. A final sample that was not returned is None.
    Without previews of images or videos, None is returned.
    """
    previews, films = result.previews, result.films()
    if previews is None or previews.ndim < 5 or films is None:
        return None
    if previews.ndim == 6:
        previews = previews[:, :, previews.shape[2] // 2]
    columns, returned = result.ancestors.shape[2], result.order.shape[1]
    rows = [
        list(row.movedim(1, -1).numpy())
        for row in previews[:, prompt * columns : (prompt + 1) * columns]
    ]
    mine = zip(result.order[prompt].tolist(), films[prompt * returned :], strict=False)
    final = {slot: np.asarray(film[len(film) // 2]) for slot, film in mine}
    return [*rows, [final.get(slot) for slot in range(columns)]]
