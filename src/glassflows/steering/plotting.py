"""Figures of a steering run (matplotlib).

A genealogy shows the particles of one prompt at each scoring, and the parent of each particle.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

_WINNER, _KEPT, _LOST = "#c1440e", "#4d4d4d", "#cccccc"
_MOST = 12  # particles or rows with pictures and scores; if there are more, particles are dots


def genealogy(result: Any, prompt: int = 0) -> Any:
    """Draw particles as columns and scorings as rows, the first at the top; return the figure.

    The last row holds the final samples. Lines lead to parents: red in the lineage of the best
    sample, dark in other lineages that reached the end. Curves beside the rows show the effective
    sample size and the rewards, their mean dark and the best red. With more than 12 particles or
    rows, particles are dots, brighter for higher rewards, and a star marks resampling.

    Args:
        result: The result of a steered call.
        prompt: Index of the prompt.
    """
    scored = np.vstack([result.scored[:, prompt].numpy(), result.rewards[prompt].numpy()[None]])
    ancestors = result.ancestors[:, prompt].numpy()
    rows, columns = scored.shape
    large = max(rows, columns) <= _MOST
    pictures = _pictures(result, prompt) if large else None
    alive = _alive(ancestors, columns)
    winner = result.lineage(prompt)

    cell = 0.72 if large else min(0.72, 6.5 / max(rows, columns))  # inches
    height = 1.3 * cell if large else cell
    figure, (tree, sizes, rewards) = plt.subplots(
        1, 3, figsize=(max(cell * columns, 1.5) + 3.4, height * rows + 0.9),
        width_ratios=[max(cell * columns, 1.5), 1.1, 1.1], layout="constrained", sharey=True,
    )  # fmt: skip
    for row in range(rows - 1):
        for slot, parent in enumerate(ancestors[row]):
            won = winner[row] == parent and winner[row + 1] == slot
            kept = alive[row + 1][slot]
            colour, order = (_WINNER, 3) if won else (_KEPT, 2) if kept else (_LOST, 1)
            tree.plot(
                [parent, slot],
                [row, row + 1],
                color=colour,
                zorder=order,
                linewidth=2.2 if won else 1.2,
            )
    low, high = scored.min(), scored.max()
    for row in range(rows):
        for slot in range(columns):
            edge = _WINNER if winner[row] == slot else _KEPT if alive[row][slot] else _LOST
            picture = pictures[row][slot] if pictures else None
            if picture is not None:
                box = OffsetImage(picture, zoom=60 * cell / max(picture.shape[:2]))
                tree.add_artist(
                    AnnotationBbox(
                        box, (slot, row), pad=0.06, bboxprops={"edgecolor": edge, "lw": 1.6}
                    )
                )
            else:
                shade = plt.get_cmap("viridis")((scored[row, slot] - low) / ((high - low) or 1.0))
                tree.scatter(
                    slot,
                    row,
                    s=(26 * cell) ** 2,
                    color=shade,
                    edgecolors=edge,
                    lw=4 * cell**0.5,
                    zorder=4,
                )
            if large:
                label, under = (
                    f"{scored[row, slot]:.3g}",
                    {"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                )
                shown = "#808080" if edge == _LOST else edge
                tree.text(
                    slot,
                    row + 0.37,
                    label,
                    ha="center",
                    va="top",
                    fontsize=9,
                    color=shown,
                    bbox=under,
                    zorder=5,
                )
    tree.set_xlim(-0.6, columns - 0.4)
    tree.set_ylim(rows - 0.3, -0.5)
    resampled = "\nresampled" if large else " *"
    marks = [resampled if one else "" for one in result.resampled[:, prompt]]
    names = [f"transition {k + 1}{mark}" for k, mark in zip(result.transitions, marks, strict=True)]
    tree.set_yticks(range(rows), [*names, "final"])
    shown = range(0, columns, 1 if large else 1 + columns // 10)
    tree.set_xticks(shown, [str(slot + 1) for slot in shown])
    tree.set_xlabel("particle")
    sizes.plot(result.ess[:, prompt].numpy(), range(rows - 1), "o-", color=_KEPT, markersize=4)
    sizes.set_xlim(0, columns * 1.05)
    sizes.set_xlabel("effective\nsample size")
    rewards.plot(scored.mean(1), range(rows), "o-", color=_KEPT, markersize=4)
    rewards.plot(scored.max(1), range(rows), "o-", color=_WINNER, markersize=4)
    rewards.set_xlabel("reward:\nmean, best")
    for axes in (tree, sizes, rewards):
        axes.tick_params(length=0, labelsize=9)
        axes.xaxis.label.set_size(9)
        axes.spines[:].set_visible(False)
        axes.grid(axis="x" if axes is not tree else "y", color="#eeeeee", zorder=0)
    return figure


def _alive(ancestors: np.ndarray, columns: int) -> list[np.ndarray]:
    """Return, row by row, which slots have descendants among the final samples."""
    alive = [np.ones(columns, bool)]
    for parents in ancestors[::-1]:
        kept = np.zeros(columns, bool)
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
    columns, returned = result.rewards.shape[1], result.order.shape[1]
    rows = [
        list(row.movedim(1, -1).numpy())
        for row in previews[:, prompt * columns : (prompt + 1) * columns]
    ]
    mine = zip(result.order[prompt].tolist(), films[prompt * returned :], strict=False)
    final = {slot: np.asarray(film[len(film) // 2]) for slot, film in mine}
    return [*rows, [final.get(slot) for slot in range(columns)]]
