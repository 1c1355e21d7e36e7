"""The state of a running transition, and the inner step that advances it.

The state holds x_t/σ_t, the innovation e, and the history of the last network call: its ẑ and
its slope Δ = ẑ_i − ẑ_{i−1}. `solver` makes the weights of the inner steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .solver import Block, InnerStep


class Slope(NamedTuple):
    """The change of ẑ from the previous network call to this call.

    Args:
        change: Δ = ẑ_i − ẑ_{i−1}, shape of x_t.
        trust: Fraction of each row's Δ that may be extrapolated, in [0, 1], shape (N, 1, …).
        unmoved: 1 in rows whose two ẑ lie on one path, 0 in rows that the host moved between the
            calls, shape (N, 1, …); None if the host moved nothing.
    """

    change: Tensor
    trust: Tensor
    unmoved: Tensor | None

    def select(self, rows: Tensor) -> Slope:
        """Return the slope of these rows."""
        unmoved = None if self.unmoved is None else self.unmoved[rows]
        return Slope(self.change[rows], self.trust[rows], unmoved)


class History(NamedTuple):
    """What the next network call needs of the last call and the inner step that followed it.

    Args:
        denoised: ẑ of the last call.
        extrapolation: What the inner step added to Euler's step.
        slope: Slope at the last call; None if no ẑ came before it.
        unmoved: 1 in rows that are where the inner step left them, 0 in rows that the host has
            moved since, shape (N, 1, …); None if the host moved nothing.
    """

    denoised: Tensor
    extrapolation: Tensor
    slope: Slope | None = None
    unmoved: Tensor | None = None

    def select(self, rows: Tensor) -> History:
        """Return the history of these rows."""
        slope = None if self.slope is None else self.slope.select(rows)
        unmoved = None if self.unmoved is None else self.unmoved[rows]
        return History(self.denoised[rows], self.extrapolation[rows], slope, unmoved)


@dataclass(frozen=True)
class InnerState:
    """What the next inner step needs, in tensors of the shape of x_t.

    Args:
        base: x_t / σ_t.
        innovation: e at the current λ, as predicted.
        history: What the corrector and the predictor need; None before the first call.
    """

    base: Tensor
    innovation: Tensor
    history: History | None = None

    def select(self, rows: Tensor) -> InnerState:
        """Return the state of these rows, each with its own history."""
        history = None if self.history is None else self.history.select(rows)
        return InnerState(self.base[rows], self.innovation[rows], history)


def start(x: Tensor, block: Block) -> InnerState:
    """Return the state in which a chain begins: x itself is the innovation, e = x/σ."""
    scaled = x / block.transition.t.sigma
    return InnerState(base=scaled, innovation=scaled)


def network_input(step: InnerStep, state: InnerState) -> Tensor:
    """Return x_in = σ_t* (cos θ · x_t/σ_t + sin θ · e), a sample of the marginal at t*."""
    return step.level.sigma * (step.cos * state.base + step.sin * state.innovation)


def inner_step(
    block: Block, i: int, state: InnerState, denoised: Tensor, noise: Tensor | None = None
) -> tuple[Tensor, InnerState]:
    """Take the i-th inner step of a transition; after the last step, leave the transition.

        e(λ_i) → e(λ_{i+1})     by  de/dλ = ẑ

    Args:
        block: The transition and the weights of its steps.
        i: Index of the network call that gave ẑ.
        state: The state whose network input that call received.
        denoised: ẑ_i, shape of x_t.
        noise: Fresh noise ε̄, the initial e of a transition; None to go on from the e of `state`.

    Returns:
        The next network input, or x_t′ at the end of the transition, and the state that belongs
        to it.
    """
    state, slope = correct(block.steps[i], state, denoised)
    if noise is not None:
        state = replace(state, innovation=noise)
    state = advance(block.steps[i], state, denoised, slope)
    if i + 1 < len(block.steps):
        return network_input(block.steps[i + 1], state), state
    return leave(block, state)


def correct(
    step: InnerStep, state: InnerState, denoised: Tensor
) -> tuple[InnerState, Slope | None]:
    """Correct the step that led to ẑ_i, now that ẑ_i is known; return the state and the slope.

    At λ = 0 that step was the last of the previous transition, and the correction moves x_t
    itself.
    """
    last = state.history
    if last is None:
        return state, None
    change, before = denoised - last.denoised, last.slope
    genuine = 1.0 if before is None or before.unmoved is None else before.unmoved
    trust = _trust(step, change, None if before is None else genuine * before.change)
    shift = 0.0 if step.correct is None else step.correct * trust * change - last.extrapolation
    if step.curve and before is not None:
        shift = shift + step.curve * trust * genuine * (change - before.change / step.ratio)
    if last.unmoved is not None:
        trust, shift = last.unmoved * trust, last.unmoved * shift
    slope = Slope(change, trust, last.unmoved)
    if step.sin:
        return replace(state, innovation=state.innovation + shift), slope
    return replace(state, base=state.base + shift), slope


def advance(
    step: InnerStep, state: InnerState, denoised: Tensor, slope: Slope | None
) -> InnerState:
    """Return the state at λ_{i+1}, given the denoised mean ẑ_i of this step's network input."""
    extrapolation = step.respond * state.innovation
    if slope is not None:
        extrapolation = extrapolation + step.predict * slope.trust * slope.change
    innovation = step.keep * state.innovation + step.euler * denoised + extrapolation
    history = History(denoised.clone(), extrapolation, slope)  # the network may reuse its buffer
    return InnerState(state.base, innovation, history)


def leave(block: Block, state: InnerState) -> tuple[Tensor, InnerState]:
    """Return x_t′ at the end of a transition, and the next initial state, with e to be drawn."""
    chosen = block.transition
    x_next = chosen.next_state(state.base, state.innovation)
    scaled = x_next / (chosen.t_next.sigma or 1.0)
    history = state.history
    if history is not None:  # in units of the new base
        scale = chosen.sigma / (chosen.t_next.sigma or 1.0)
        history = history._replace(extrapolation=scale * history.extrapolation)
    return x_next, InnerState(base=scaled, innovation=scaled, history=history)


def moved(step: InnerStep, state: InnerState, x: Tensor, returned: Tensor) -> InnerState:
    """Return the state whose network input at this step is x, moved by δ = x − returned.

        δ(x_t/σ_t) = cos θ · δ/σ_t*,   δe = sin θ · δ/σ_t*

    The state moves along the sufficient direction. The history of a moved row belongs to another
    path, and the row forgets it. A host that only rounds its latents, to bfloat16 at the coarsest,
    moves no row.
    """
    delta, history = x - returned, state.history
    if history is not None:
        changed = (delta.abs() > 2**-8 * returned.abs()).to(delta.dtype)
        history = history._replace(unmoved=(_row_mean(changed) == 0).to(delta.dtype))
    delta = delta / step.level.sigma
    return InnerState(state.base + step.cos * delta, state.innovation + step.sin * delta, history)


def _trust(step: InnerStep, change: Tensor, before: Tensor | None) -> Tensor:
    """Return the fraction of each row's Δ that may be extrapolated, in [0, 1], shape (N, 1, …).

    Between two precisions the posterior mean of a standard Gaussian moves by less than the variance
    it gains, which is the unit of the budget. A smooth path does not turn back. Strong guidance
    breaks both rules where steps are too long, and the step falls back to Euler's. An extrapolation
    that hardly moves the network's input, as in every short step, is trusted in any case.
    """
    tiny = torch.finfo(change.dtype).tiny
    square = _row_mean(change.square()).clamp(min=tiny)
    trust = (step.budget / square).clamp(max=1.0)
    if before is not None and step.ratio:
        kept = _row_mean(change * before) / _row_mean(before.square()).clamp(min=tiny)
        trust = trust * (1 + step.ratio * kept).clamp(0.0, 1.0)
    return torch.maximum(trust, (step.harmless / square).clamp(max=1.0))


def _row_mean(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).mean(1).view(-1, *[1] * (x.ndim - 1))
