"""Width over time: how many particles of a prompt live in which part of a run.

The transitions of a run are split into as many contiguous parts as there are widths, as evenly as
possible, the first ones longer. At the start of part j > 0 the population shrinks to `widths[j]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..scheduler.hooks import Boundary
from .strategy import is_whole


def checked_widths(widths: Any) -> tuple[int, ...]:
    """Return widths as a tuple.

    Raises:
        ValueError: unless they are whole numbers of at least 1, at least one, that never grow.
    """
    listed = list(widths) if isinstance(widths, Iterable) and not isinstance(widths, str) else []
    whole = all(is_whole(width) and width >= 1 for width in listed)
    if not listed or not whole or listed != sorted(listed, reverse=True):
        raise ValueError(
            "widths: expected whole numbers of at least 1, none larger than the one before it, got "
            f"{widths!r}: list how many particles live in each part of a run, such as (16, 8, 4)"
        )
    return tuple(int(width) for width in listed)


def check_first(widths: Sequence[int], particles: int) -> None:
    """Raise ValueError unless a run of that many particles begins with the first width."""
    if widths[0] != particles:
        raise ValueError(
            f"widths: expected to begin with num_particles={particles}, got {tuple(widths)}: pass "
            f"num_particles={widths[0]}, or other widths"
        )


def check_enough(widths: Sequence[int], transitions: int, what: str = "") -> None:
    """Raise ValueError if there are more widths than transitions to split.

    Args:
        widths: One for each part.
        transitions: How many are split.
        what: Which these are, for the message.
    """
    if len(widths) > transitions:
        raise ValueError(
            f"widths: expected at most {transitions}, one for each transition of this run{what}, "
            f"got {len(widths)}, {tuple(widths)}: take fewer widths, or more transitions or steps"
        )


def new_width(widths: Sequence[int], index: int, transitions: int) -> int | None:
    """Return the width that the population shrinks to at a boundary; None where no part begins.

    Args:
        widths: One for each part.
        index: Number of the transition that begins.
        transitions: How many are split; later ones belong to the last part.
    """
    length, longer = divmod(transitions, len(widths))
    starts = [part * length + min(part, longer) for part in range(len(widths))]
    return widths[starts.index(index)] if index > 0 and index in starts else None


def num_stochastic(at: Boundary) -> int:
    """Return how many transitions can be split where fresh noise has to follow, at least 1."""
    return max(1, at.total if at.num_stochastic is None else at.num_stochastic)
