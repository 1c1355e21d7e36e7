"""How many particles a budget of network calls or seconds pays for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any, NamedTuple

from ..flow.noise import RectifiedFlow
from ..host.ledger import Ledger
from ..scheduler.hooks import Boundary, LookAhead
from .strategy import Strategy, looks_ahead
from .widths import new_width

TRANSITIONS = 5
"""As the paper has for 50 calls, and the scenes for 20; fewer where each would have one call."""


def num_transitions(strategy: Any, given: int | None, num_inference_steps: int) -> int:
    """Return the transitions that a steerer or its strategy names, else as many as suit.

    Args:
        strategy: The strategy: its calibration, or its list of scales, names them.
        given: What the steerer names; None for nothing.
        num_inference_steps: Calls of the chain of each particle.
    """
    scale = getattr(strategy, "reward_scale", None)
    calibration = getattr(strategy, "calibration", None)
    if given is not None:
        number = given
    elif calibration is not None:
        number = calibration.num_transitions
    elif isinstance(scale, tuple):
        number = len(scale)
    else:
        number = min(TRANSITIONS, num_inference_steps // 2)
    return max(1, min(number, num_inference_steps))


def boundaries(transitions: int, num_inference_steps: int) -> list[Boundary]:
    """Return the boundaries of a run; that of a last single call, which ends in ẑ, has no noise."""
    path, noisy = RectifiedFlow(), transitions - (num_inference_steps < 2 * transitions)
    return [
        Boundary(k, transitions, path.level(k / transitions), k < noisy, num_stochastic=noisy)
        for k in range(transitions)
    ]


class Budget(NamedTuple):
    """A proposal of how to spend network calls on a prompt.

    Args:
        num_particles: K; of a population that shrinks, at the start.
        widths: Particles in each part of the run.
        network_calls: What a prompt costs by this proposal.
    """

    num_particles: int
    widths: tuple[int, ...]
    network_calls: int


def proposals(
    network_calls: int,
    num_inference_steps: int,
    transitions: int,
    strategy: Strategy[Any],
    shares: Sequence[int],
    ahead: LookAhead | None,
) -> Iterator[Budget]:
    """Yield the populations of at least 2 particles that a number of calls pays for, largest first.

    Args:
        network_calls: Calls that may be spent on a prompt.
        num_inference_steps: Calls of the chain of each particle.
        transitions: Transitions of that chain.
        strategy: How particles are steered: where they look ahead, and where they become fewer.
        shares: Ratios of the widths of the parts of a run, such as (4, 2, 1).
        ahead: Excursions of a particle at a boundary; None for none.
    """
    run = boundaries(transitions, num_inference_steps)
    each = _calls_of_parts(num_inference_steps, run, strategy, shares, ahead)
    for number in range(network_calls // each[0], 1, -1):
        widths = tuple(max(1, round(number * share / shares[0])) for share in shares)
        cost = sum(width * calls for width, calls in zip(widths, each, strict=True))
        if cost <= network_calls:
            yield Budget(number, widths, cost)


def _calls_of_parts(
    steps: int,
    run: Sequence[Boundary],
    strategy: Strategy[Any],
    widths: Sequence[int],
    ahead: LookAhead | None,
) -> list[int]:
    """Return the calls of a particle in each part of a run, excursions included."""

    def evenly(at: Boundary) -> int | None:
        return new_width(widths, at.index, at.total)

    width_at = getattr(strategy, "width_at", evenly)
    away = ahead.calls * ahead.samples if ahead else 0
    length, longer = divmod(steps, len(run))
    calls, part = [0] * len(widths), 0
    for at in run:
        calls[part] += 1 + (away if away and looks_ahead(strategy, at) else 0)  # before it shrinks
        part += width_at(at) is not None
        calls[part] += length + (at.index < longer) - 1
    return calls


def affordable_calls(seconds: float, ledger: Ledger) -> int:
    """Return the network calls that so many seconds pay for, decodes and rewards included.

    Args:
        seconds: The budget.
        ledger: Of an earlier call with the same steps and options.

    Raises:
        ValueError: if the budget or the ledger names no time.
    """
    if not isinstance(seconds, Real) or isinstance(seconds, bool) or not seconds > 0:
        raise ValueError(f"seconds: expected a number above 0, got {seconds!r}")
    total = ledger.seconds.get("total", 0.0)
    if not total > 0 or not ledger.network_calls:
        raise ValueError(
            f"ledger: expected that of an earlier call, with its seconds, got {ledger!r}: pass "
            "result.ledger"
        )
    return int(seconds * ledger.network_calls / total)
