"""The timetable of network calls and the weights that integrate the inner ODE de/dλ = ẑ between them.

Between two calls ẑ is taken linear in ψ(λ) = atan2(a, λ), a = √(1 + P_t): smooth in λ at 0 and in 1/λ at data for every
P_t, so that P_t = 0 needs no variable of its own. The predictor extrapolates the last two ẑ of this transition; when
the next ẑ arrives, the corrector replaces the extrapolation by the interpolation, at no further call (as UniPC does).
All weights are integrals ∫ (ψ(λ) − ψ_i) dλ, made once in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from .noise import NoiseLevel, NoiseSchedule
from .transition import Correlation, Transition, check_num_transitions, first_transition, transition

InnerGrid = Literal["time", "condot"]


@dataclass(frozen=True)
class Solver:
    """How the inner ODE is integrated.

    Args:
        order: 1 for Euler, 2 for the two-step predictor.
        corrector: With order 2, correct each step once its end has been evaluated.
        grid: Where the calls of a transition lie: "time" evenly on the grid of network times, "condot" at the paper's
            uniform s.
        last_step: With order 2, the fraction of the way to data over which ẑ is extrapolated in the step that ends
            there.

    Raises:
        ValueError: if the order is neither 1 nor 2, or there is no grid of that name.
    """

    order: int = 2
    corrector: bool = True
    grid: InnerGrid = "time"
    last_step: float = 0.5

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"solver_order: expected 1 (Euler) or 2 (two-step), got {self.order!r}")
        if self.grid not in ("time", "condot"):
            raise ValueError(f'inner_grid: expected "time" or "condot", got {self.grid!r}')


@dataclass(frozen=True)
class InnerStep:
    """One network call and the inner step that follows it, e(λ_i) → e(λ_{i+1}).

    Args:
        level: Noise level t* of the network input.
        cos: √(P_t / P), weight of x_t/σ_t in the network input; `sin` = λ/√P that of e.
        keep: Weight of e; 1, or 0 in the step to data, where e becomes ẑ itself.
        euler: Weight of ẑ_i; λ_{i+1} − λ_i, or 1 in the step to data.
        predict: Weight of ẑ_i − ẑ_{i−1}, the predictor.
        correct: Weight of ẑ_i − ẑ_{i−1} in the corrected step that led to λ_i; None where it stays uncorrected.
    """

    level: NoiseLevel
    cos: float
    sin: float
    keep: float
    euler: float
    predict: float
    correct: float | None


@dataclass(frozen=True)
class Block:
    """A transition and its inner steps."""

    transition: Transition
    steps: tuple[InnerStep, ...]


class History(NamedTuple):
    """The last inner step: e at its end by Euler alone, and the ẑ it used."""

    euler: Tensor
    denoised: Tensor


@dataclass(frozen=True)
class InnerState:
    """What the next inner step needs. Tensors of the shape of x_t.

    Args:
        base: x_t / σ_t.
        innovation: e at the current λ, as predicted.
        history: What the corrector and the next predictor need; None before the first call.
    """

    base: Tensor
    innovation: Tensor
    history: History | None = None


def network_input(step: InnerStep, state: InnerState) -> Tensor:
    """Return x_in = σ_t* (cos θ · x_t/σ_t + sin θ · e), a sample of the model's own marginal at t*."""
    return step.level.sigma * (step.cos * state.base + step.sin * state.innovation)


def advance(step: InnerStep, state: InnerState, denoised: Tensor) -> InnerState:
    """Return the state at λ_{i+1}, given the denoised mean ẑ_i of this step's network input."""
    innovation, change = state.innovation, None
    if state.history is not None:
        change = denoised - state.history.denoised
        if step.correct is not None:
            innovation = state.history.euler + step.correct * change
    euler = step.keep * innovation + step.euler * denoised
    predicted = euler if change is None else euler + step.predict * change
    return InnerState(state.base, predicted, History(euler, denoised))


def moved(step: InnerStep, state: InnerState, delta: Tensor) -> InnerState:
    """Return the state whose network input at this step is moved by δ, along the sufficient direction.

    δ(x_t/σ_t) = cos θ · δ/σ_t*,   δe = sin θ · δ/σ_t*
    """
    delta = delta / step.level.sigma
    innovation, history = step.sin * delta, state.history
    return InnerState(
        base=state.base + step.cos * delta,
        innovation=state.innovation + innovation,
        history=None if history is None else history._replace(euler=history.euler + innovation),
    )


def inner_steps(
    chosen: Transition, lams: Sequence[float], levels: Sequence[NoiseLevel], solver: Solver
) -> tuple[InnerStep, ...]:
    """Return the inner steps of a transition whose network calls lie at λ_0 … λ_{n−1}, at noise levels t*."""
    scale = math.sqrt(1 + chosen.base_snr)

    def psi(lam: float) -> float:
        return math.atan2(scale, lam)

    def integral(start: float, end: float) -> float:  # ∫ (ψ(λ) − ψ(start)) dλ
        def primitive(lam: float) -> float:
            return lam * psi(lam) + scale / 2 * math.log(scale**2 + lam**2)

        return primitive(end) - primitive(start) - psi(start) * (end - start)

    steps = []
    ends = [*lams[1:], chosen.lam_end]
    for i, (lam, end) in enumerate(zip(lams, ends, strict=True)):
        theta = chosen.angle(lam)
        to_data = math.isinf(end)
        predict, correct = 0.0, None
        if i > 0 and solver.order == 2:
            slope = 1 / (psi(lam) - psi(lams[i - 1]))
            predict = slope * (-psi(lam) * solver.last_step if to_data else integral(lam, end))
            correct = slope * integral(lams[i - 1], lam) if solver.corrector else None
        keep, euler = (0.0, 1.0) if to_data else (1.0, end - lam)
        steps.append(InnerStep(levels[i], math.cos(theta), math.sin(theta), keep, euler, predict, correct))
    return tuple(steps)


def condot_lams(chosen: Transition, num_steps: int) -> list[float]:
    """Return the paper's λ(s) = s ᾱ / ((1 − s) + s σ̄) at uniform s, from the transition's first λ on."""
    start = chosen.lam_start / (chosen.alpha + chosen.lam_start * (1 - chosen.sigma))
    grid = np.linspace(start, 1.0, num_steps + 1)[:-1]
    return [float(s * chosen.alpha / ((1 - s) + s * chosen.sigma)) for s in grid]


def block(
    chosen: Transition,
    num_steps: int,
    *,
    times: Callable[[float], Sequence[float]],
    schedule: NoiseSchedule,
    solver: Solver,
) -> Block:
    """Lay the `num_steps` network calls of one transition.

    Args:
        times: Maps the last network time t*(λ̄) to the times of the calls, for the grid "time".
    """
    if solver.grid == "condot":
        lams = condot_lams(chosen, num_steps)
        levels = [schedule.level(schedule.time(chosen.snr(lam))) for lam in lams]
        lams[0], levels[0] = chosen.lam_start, chosen.t
        return Block(chosen, inner_steps(chosen, lams, levels, solver))
    last = schedule.time(chosen.snr(chosen.lam_end))
    return block_at(chosen, [chosen.t, *(schedule.level(t) for t in times(last)[1:])], solver)


def block_at(chosen: Transition, levels: Sequence[NoiseLevel], solver: Solver) -> Block:
    """Lay the network calls of one transition at given noise levels t*."""
    return Block(chosen, inner_steps(chosen, [chosen.lam(level.snr) for level in levels], levels, solver))


def timetable(
    grid: Sequence[NoiseLevel],
    num_transitions: int,
    *,
    schedule: NoiseSchedule,
    correlation: Correlation,
    solver: Solver,
) -> list[Block]:
    """Split the N network calls of a grid of N + 1 noise levels into transitions, as evenly as possible.

    With ρ_DDPM the calls are at the grid itself. For another ρ let g(u) be the grid interpolated by index: the calls
    of a transition lie at equal steps of u from u(t) to u(t*(λ̄)).

    Raises:
        ValueError: if `num_transitions` is not at least 1.
    """
    num_steps = len(grid) - 1
    num_transitions = min(check_num_transitions(num_transitions), num_steps)
    blocks, index, grid_times = [], np.arange(num_steps + 1), [level.t for level in grid]
    for calls in np.array_split(index[:-1], num_transitions):
        start, end = int(calls[0]), int(calls[-1]) + 1
        first = start == 0
        chosen = first_transition(grid[0], grid[end]) if first else transition(grid[start], grid[end], correlation)
        if solver.grid == "time" and (first or correlation == "ddpm"):
            blocks.append(block_at(chosen, grid[start:end], solver))
            continue

        def times(last: float, start: int = start, calls: int = end - start) -> Sequence[float]:
            u = np.linspace(start, np.interp(last, grid_times, index), calls + 1)[:-1]
            return [float(t) for t in np.interp(u, index, grid_times)]

        blocks.append(block(chosen, end - start, times=times, schedule=schedule, solver=solver))
    return blocks


def cut(blocks: Sequence[Block], begin: int, solver: Solver) -> list[Block]:
    """Return the timetable from call `begin` on.

    A transition that is cut has no state to start from but its network input, so it becomes a first transition: the ODE
    through the rest of its calls, to the same end.
    """
    blocks = list(blocks)
    while begin >= len(blocks[0].steps):
        begin -= len(blocks.pop(0).steps)
    levels, end = [step.level for step in blocks[0].steps[begin:]], blocks[0].transition.t_next
    return [block_at(first_transition(levels[0], end), levels, solver), *blocks[1:]]
