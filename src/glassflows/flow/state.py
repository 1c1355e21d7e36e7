"""The state of a running transition, and the inner step that moves it with the weights of `solver`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .solver import Block, InnerStep


class History(NamedTuple):
    """What the next call needs of the last: ẑ, what its step added to Euler's, the Δ it saw and the trust in it.

    `trust` is, before that call, what it is to be multiplied by: 0 in rows that the host has changed since. `genuine`
    is 0 in rows whose Δ had such a change in it, None where none had.
    """

    denoised: Tensor
    extrapolation: Tensor
    change: Tensor | None = None
    trust: Tensor | None = None
    genuine: Tensor | None = None


@dataclass(frozen=True)
class InnerState:
    """What the next inner step needs. Tensors of the shape of x_t.

    Args:
        base: x_t / σ_t.
        innovation: e at the current λ, as predicted.
        history: What the corrector and the predictor need; None before the first call.
    """

    base: Tensor
    innovation: Tensor
    history: History | None = None

    def select(self, rows: Tensor) -> InnerState:
        """Return the state of these rows: what a particle has learnt moves with it."""
        last = self.history
        if last is not None:
            optional = (None if value is None else value[rows] for value in last[2:])
            last = History(last.denoised[rows], last.extrapolation[rows], *optional)
        return InnerState(self.base[rows], self.innovation[rows], last)


def start(x: Tensor, plan: Block) -> InnerState:
    """Return the state in which a chain begins: x itself is the innovation, e = x/σ (design: the first transition)."""
    scaled = x / plan.transition.t.sigma
    return InnerState(base=scaled, innovation=scaled)


def network_input(step: InnerStep, state: InnerState) -> Tensor:
    """Return x_in = σ_t* (cos θ · x_t/σ_t + sin θ · e), a sample of the model's own marginal at t*."""
    return step.level.sigma * (step.cos * state.base + step.sin * state.innovation)


def correct(step: InnerStep, state: InnerState, denoised: Tensor) -> InnerState:
    """Return the state with the step that led here corrected, now that ẑ_i is known.

    At λ = 0 that step was the last of the transition before, and what is corrected is x_t itself.
    """
    last = state.history
    if last is None:
        return state
    change = denoised - last.denoised
    genuine = 1.0 if last.genuine is None else last.genuine
    trust = _trust(step, change, None if last.change is None else genuine * last.change)
    shift = 0.0 if step.correct is None else step.correct * trust * change - last.extrapolation
    if step.curve and last.change is not None:
        shift = shift + step.curve * trust * genuine * (change - last.change / step.ratio)
    if last.trust is not None:
        trust, shift = last.trust * trust, last.trust * shift
    state = replace(state, history=History(denoised, last.extrapolation, change, trust, last.trust))
    if step.sin:
        return replace(state, innovation=state.innovation + shift)
    return replace(state, base=state.base + shift)


def advance(step: InnerStep, state: InnerState, denoised: Tensor) -> InnerState:
    """Return the state at λ_{i+1}, given the denoised mean ẑ_i of this step's network input."""
    last = state.history
    extrapolation = step.respond * state.innovation
    if last is not None and last.trust is not None and last.change is not None:
        extrapolation = extrapolation + step.predict * last.trust * last.change
    innovation = step.keep * state.innovation + step.euler * denoised + extrapolation
    change, genuine = (last.change, last.genuine) if last else (None, None)
    denoised = denoised.clone()  # the network may reuse its buffer
    return InnerState(state.base, innovation, History(denoised, extrapolation, change, genuine=genuine))


def leave(plan: Block, state: InnerState) -> tuple[Tensor, InnerState]:
    """Return x_t′ at the end of a transition, and the state in which the next one begins, e still to be drawn."""
    chosen = plan.transition
    x_next = chosen.next_state(state.base, state.innovation)
    scaled = x_next / (chosen.t_next.sigma or 1.0)
    history = state.history
    if history is not None:  # in units of the new base
        scale = chosen.sigma / (chosen.t_next.sigma or 1.0)
        history = history._replace(extrapolation=scale * history.extrapolation)
    return x_next, InnerState(base=scaled, innovation=scaled, history=history)


def moved(step: InnerStep, state: InnerState, x: Tensor, returned: Tensor) -> InnerState:
    """Return the state whose network input at this step is x, moved by δ = x − returned along the sufficient direction.

    δ(x_t/σ_t) = cos θ · δ/σ_t*,   δe = sin θ · δ/σ_t*

    What a row that was moved had learnt belongs to another path: it forgets it. A host that only rounds its latents, to
    bfloat16 at the coarsest, moves no row.
    """
    delta, history = x - returned, state.history
    if history is not None:
        changed = (delta.abs() > 2**-8 * returned.abs()).to(delta.dtype)
        history = history._replace(trust=(_row_mean(changed) == 0).to(delta.dtype))
    delta = delta / step.level.sigma
    return InnerState(state.base + step.cos * delta, state.innovation + step.sin * delta, history)


def _trust(step: InnerStep, change: Tensor, before: Tensor | None) -> Tensor:
    """Return how far each row's Δ may be extrapolated, in [0, 1], shape (N, 1, …).

    Between two precisions the mean of a standard Gaussian moves by less than the variance it gains, the budget's unit;
    and a smooth path does not turn back. Strong guidance breaks both where the steps are too long for it, and there the
    step falls back to Euler's. What hardly moves the network's input is trusted anyway, and so every short step is.
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
