"""Figures of a steering run (matplotlib)."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

_WINNER, _KEPT, _LOST = "#c1440e", "#4d4d4d", "#cccccc"


def genealogy(result: Any, prompt: int = 0) -> Any:
    """Draw particles as columns and scorings as rows, from the first at the top to the final samples at the bottom.

    Lines lead to parents: of the lineages that reached the end dark, of the best red. Beside it the effective sample
    size and the rewards.

    Args:
        result: The result of a steered call.
        prompt: Index of the prompt.
    """
    scored = np.vstack([result.scored[:, prompt].numpy(), result.rewards[prompt].numpy()[None]])
    ancestors = result.ancestors[:, prompt].numpy()
    rows, columns = scored.shape
    pictures = _pictures(result, prompt)
    alive = _alive(ancestors, columns)
    winner = result.lineage(prompt)

    figure, (tree, sizes, rewards) = plt.subplots(
        1, 3, figsize=(2.2 + 0.85 * columns + 3.2, 0.8 + 1.15 * rows), width_ratios=[0.85 * columns, 1.5, 1.5],
        layout="constrained", sharey=True,
    )  # fmt: skip
    for row in range(rows - 1):
        for slot, parent in enumerate(ancestors[row]):
            won = winner[row] == parent and winner[row + 1] == slot
            kept = alive[row + 1][slot]
            colour, order = (_WINNER, 3) if won else (_KEPT, 2) if kept else (_LOST, 1)
            tree.plot([parent, slot], [row, row + 1], color=colour, zorder=order, linewidth=2.2 if won else 1.2)
    low, high = scored.min(), scored.max()
    for row in range(rows):
        for slot in range(columns):
            shade = (scored[row, slot] - low) / ((high - low) or 1.0)
            edge = _WINNER if winner[row] == slot else _KEPT if alive[row][slot] else _LOST
            if pictures is not None:
                box = OffsetImage(pictures[row][slot], zoom=46 / max(pictures[row][slot].shape[:2]))
                tree.add_artist(AnnotationBbox(box, (slot, row), pad=0.08, bboxprops={"edgecolor": edge, "lw": 1.6}))
            else:
                tree.scatter(slot, row, s=260, color=plt.get_cmap("viridis")(shade), edgecolors=edge, lw=2, zorder=4)
            label, under = f"{scored[row, slot]:.3g}", {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            shown = "#999999" if edge == _LOST else edge
            tree.text(slot, row + 0.36, label, ha="center", va="top", fontsize=7, color=shown, bbox=under, zorder=5)
    tree.set_xlim(-0.6, columns - 0.4)
    tree.set_ylim(rows - 0.35, -0.5)
    names = [f"transition {k + 1}" for k in result.transitions] + ["final"]
    tree.set_yticks(range(rows), [
        f"{name}\nresampled" if i < rows - 1 and result.resampled[i, prompt] else name for i, name in enumerate(names)
    ], fontsize=8)  # fmt: skip
    tree.set_xticks(range(columns), [str(slot + 1) for slot in range(columns)], fontsize=8)
    tree.set_xlabel("particle", fontsize=8)
    sizes.plot(result.ess[:, prompt].numpy(), range(rows - 1), "o-", color=_KEPT, markersize=4)
    sizes.set_xlim(0, columns * 1.05)
    sizes.set_xlabel("effective\nsample size", fontsize=8)
    rewards.plot(scored.mean(1), range(rows), "o-", color=_KEPT, markersize=4, label="mean")
    rewards.plot(scored.max(1), range(rows), "o-", color=_WINNER, markersize=4, label="best")
    rewards.set_xlabel("reward", fontsize=8)
    rewards.legend(fontsize=7, frameon=False)
    for axes in (tree, sizes, rewards):
        axes.tick_params(length=0, labelsize=8)
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


def _pictures(result: Any, prompt: int) -> list[Any] | None:
    """Return the previews and final images of a prompt, (H, W, 3) each, where there are previews of images."""
    columns = result.rewards.shape[1]
    pictures = result._pictures()
    everything = result.order.shape[1] == columns
    if result.previews is None or result.previews.ndim != 5 or pictures is None or not everything:
        return None
    first = prompt * columns
    rows = [list(np.moveaxis(row[first : first + columns].numpy(), 1, -1)) for row in result.previews]
    by_slot = {int(slot): np.asarray(pictures[first + i]) for i, slot in enumerate(result.order[prompt])}
    return [*rows, [by_slot[slot] for slot in range(columns)]]
