"""How many particles a budget of network calls or seconds pays for."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

from ..host.ledger import Ledger
from .widths import new_width

TRANSITIONS = 5
"""As the paper has for 50 calls, and the scenes for 20; fewer where each would have one call."""


class Budget(NamedTuple):
    """A proposal of how to spend network calls on a prompt.

    Args:
        num_particles: K; of a population that shrinks, at the start.
        num_transitions: Number of transitions.
        widths: Particles in each part of the run.
        network_calls: What a prompt costs by this proposal.
    """

    num_particles: int
    num_transitions: int
    widths: tuple[int, ...]
    network_calls: int


def propose(
    network_calls: int, num_inference_steps: int, shares: Sequence[int] = (1,), away: int = 0
) -> Budget:
    """Return the largest population that a number of network calls pays for.

    Args:
        network_calls: Calls that may be spent on a prompt.
        num_inference_steps: Calls per particle.
        shares: Ratios of the widths of the parts of a run, such as (4, 2, 1).
        away: Calls of excursions from each boundary after the first.

    Raises:
        ValueError: if they do not pay for two particles at the start.
    """
    transitions = max(1, min(TRANSITIONS, num_inference_steps // 2))
    each = _calls_of_parts(num_inference_steps, transitions, len(shares), away)

    def proposed(number: int) -> Budget:
        widths = tuple(max(1, round(number * share / shares[0])) for share in shares)
        cost = sum(width * calls for width, calls in zip(widths, each, strict=True))
        return Budget(number, transitions, widths, cost)

    if proposed(2).network_calls > network_calls:
        raise ValueError(
            f"network_calls: expected at least {proposed(2).network_calls}, for 2 particles of a "
            f"prompt, got {network_calls}: raise the budget, or take fewer steps"
        )
    number = 2
    while proposed(number + 1).network_calls <= network_calls:
        number += 1
    return proposed(number)


def _calls_of_parts(steps: int, transitions: int, parts: int, away: int) -> list[int]:
    """Return the calls of a particle in each part of a run, excursions included."""
    length, longer = divmod(steps, transitions)
    calls, part = [0] * parts, 0
    for k in range(transitions):
        calls[part] += 1 + (away if k else 0)  # before it shrinks
        if new_width(range(parts), k, transitions) is not None:
            part += 1
        calls[part] += length + (k < longer) - 1
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
