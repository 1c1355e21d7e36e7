"""The timetable: which network calls belong to which transition, and at what times.

A timetable is a list of blocks, one for each transition of a chain. A block is laid at the noise
levels t* of its network calls, or at their λ (inner grid "condot").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .noise import NoiseLevel, NoiseSchedule
from .solver import Block, Solver, lay
from .transition import (
    Correlations,
    Transition,
    check_num_transitions,
    correlation_at,
    first_transition,
    transition,
)


def condot_lams(chosen: Transition, num_steps: int) -> list[float]:
    """Return the λ of a transition's network calls at the paper's uniform s.

        λ(s) = s ᾱ / ((1 − s) + s σ̄)

    The first λ is the transition's `lam_start`.
    """
    start = chosen.lam_start / (chosen.alpha + chosen.lam_start * (1 - chosen.sigma))
    grid = np.linspace(start, 1.0, num_steps + 1)[:-1]
    return [float(s * chosen.alpha / ((1 - s) + s * chosen.sigma)) for s in grid]


def block_of(
    chosen: Transition,
    num_steps: int,
    *,
    times: Callable[[float], Sequence[float]],
    schedule: NoiseSchedule,
    solver: Solver,
    previous: Block | None = None,
) -> Block:
    """Lay the `num_steps` network calls of one transition.

    Args:
        times: Maps the last network time t*(λ̄) to the times of the calls, for the grid "time".
        previous: The previous block, if its last ẑ may serve this one.
    """
    if solver.grid == "condot":
        lams = condot_lams(chosen, num_steps)
        levels = [schedule.level(schedule.time(chosen.snr(lam))) for lam in lams]
        lams[0], levels[0] = chosen.lam_start, chosen.t
        return lay(chosen, lams, levels, solver, previous)
    last = schedule.time(chosen.snr(chosen.lam_end))
    return block_at(
        chosen, [chosen.t, *(schedule.level(t) for t in times(last)[1:])], solver, previous
    )


def block_at(
    chosen: Transition, levels: Sequence[NoiseLevel], solver: Solver, previous: Block | None = None
) -> Block:
    """Lay the network calls of one transition at given noise levels t*."""
    return lay(chosen, [chosen.lam(level.snr) for level in levels], levels, solver, previous)


def timetable(
    grid: Sequence[NoiseLevel],
    num_transitions: int,
    *,
    schedule: NoiseSchedule,
    correlation: Correlations,
    solver: Solver,
    draw_first: bool = False,
) -> list[Block]:
    """Split the network calls of a grid of noise levels into transitions, as evenly as possible.

    With ρ_DDPM the calls lie on the grid itself. For another ρ, let g(u) be the grid interpolated
    by index: the calls of a transition lie at equal steps of u from u(t) to u(t*(λ̄)).

    Args:
        grid: N + 1 noise levels for N network calls, noise first.
        draw_first: Whether the first transition draws noise as the others do, instead of being the
            ODE from the initial latents.

    Raises:
        ValueError: if `num_transitions` is not at least 1, or a correlation is not valid.
    """
    num_steps = len(grid) - 1
    num_transitions = min(check_num_transitions(num_transitions), num_steps)
    blocks: list[Block] = []
    index, grid_times = np.arange(num_steps + 1), [level.t for level in grid]
    for k, calls in enumerate(np.array_split(index[:-1], num_transitions)):
        start, end = int(calls[0]), int(calls[-1]) + 1
        drawn = k > 0 or draw_first
        unused = not drawn and callable(correlation)  # a rule need not be defined at pure noise
        rho = (
            "ddpm"
            if unused
            else correlation_at(correlation, k, num_transitions, grid[start].t, grid[end].t)
        )
        chosen = (
            transition(grid[start], grid[end], rho)
            if drawn
            else first_transition(grid[0], grid[end])
        )
        previous = blocks[-1] if k else None
        if solver.grid == "time" and (not drawn or rho == "ddpm"):
            blocks.append(block_at(chosen, grid[start:end], solver, previous))
            continue

        def times(last: float, start: int = start, calls: int = end - start) -> Sequence[float]:
            u = np.linspace(start, np.interp(last, grid_times, index), calls + 1)[:-1]
            return [float(t) for t in np.interp(u, index, grid_times)]

        blocks.append(
            block_of(
                chosen,
                end - start,
                times=times,
                schedule=schedule,
                solver=solver,
                previous=previous,
            )
        )
    return blocks


def excursion(
    grid: Sequence[NoiseLevel],
    start: int,
    num_calls: int,
    *,
    schedule: NoiseSchedule,
    solver: Solver,
) -> Block:
    """Lay a transition from a level of the grid to its end, whose first call is at that level.

    It draws from p(z | x_t). The other calls are at levels of the grid, as evenly as possible,
    where there are as many; else at equal steps of the grid interpolated by index.

    Args:
        grid: N + 1 noise levels, noise first.
        start: Index of the level it starts from.
        num_calls: Number of calls beside the first.
    """
    end = len(grid) - 1
    places = np.linspace(start, end, num_calls + 2)[1:-1]
    if num_calls < end - start:
        levels = [grid[round(place)] for place in places]
    else:
        times = np.interp(places, np.arange(end + 1), [level.t for level in grid])
        levels = [schedule.level(float(t)) for t in times]
    return block_at(transition(grid[start], grid[end], "ddpm"), [grid[start], *levels], solver)


def cut(
    blocks: Sequence[Block], begin: int, solver: Solver, draw_first: bool = False
) -> list[Block]:
    """Return the timetable from call `begin` on.

    A transition that is cut can start only from its network input at call `begin`. It becomes the
    plain ODE through the rest of its calls, to the same end. With `draw_first` it becomes the DDPM
    transition instead, unless the call lies at that end or beyond.
    """
    blocks = list(blocks)
    while begin >= len(blocks[0].steps):
        begin -= len(blocks.pop(0).steps)
    levels, chosen = [step.level for step in blocks[0].steps[begin:]], blocks[0].transition
    if not draw_first or levels[0].snr >= chosen.t_next.snr:
        chosen = first_transition(levels[0], chosen.t_next)
    elif begin > 0:
        chosen = transition(levels[0], chosen.t_next, "ddpm")
    blocks[0] = block_at(chosen, levels, solver)
    if len(blocks) > 1:  # its first call corrects the transition that was cut
        after = blocks[1]
        blocks[1] = lay(
            after.transition,
            after.lams[:-1],
            [step.level for step in after.steps],
            solver,
            previous=blocks[0],
        )
    return blocks
