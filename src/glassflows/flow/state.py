"""The state of a running transition, and the inner step that advances it.

The state holds x_t/σ_t, the innovation e, and the history of the last network call: its ẑ and
its slope Δ = ẑ_i − ẑ_{i−1}. `solver` makes the weights of the inner steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .denoise import combination
from .solver import Block, InnerStep

_SMOOTH = 1 / 8  # Δ²/budget with which a chain begins
_FAR = 14.0  # beyond a millionfold, a log(Δ²/budget) counts for no more


class Slope(NamedTuple):
    """The change of ẑ from the previous network call to this call.

    Args:
        change: Δ = ẑ_i − ẑ_{i−1}, shape of x_t.
        square: Mean square of each row's Δ, shape (N, 1, …).
        trust: Fraction of each row's Δ that may be extrapolated, in [0, 1], shape (N, 1, …).
        unmoved: 1 in rows whose two ẑ lie on one path, 0 in rows that the host moved between the
            calls, shape (N, 1, …); None if the host moved nothing.
    """

    change: Tensor
    square: Tensor
    trust: Tensor
    unmoved: Tensor | None

    def select(self, rows: Tensor) -> Slope:
        """Return the slope of these rows."""
        return Slope(*(None if one is None else one[rows] for one in self))  # type: ignore[arg-type]


class History(NamedTuple):
    """What the next network call needs of the last call and the inner step that followed it.

    Args:
        denoised: ẑ of the last call.
        extrapolation: What the inner step added to Euler's step; None for nothing.
        slope: Slope at the last call; None if it used none.
        unmoved: 1 in rows that are where the inner step left them, 0 in rows that the host has
            moved since, shape (N, 1, …); None if the host moved nothing.
    """

    denoised: Tensor
    extrapolation: Tensor | None
    slope: Slope | None = None
    unmoved: Tensor | None = None

    def select(self, rows: Tensor) -> History:
        """Return the history of these rows."""
        extrapolation = None if self.extrapolation is None else self.extrapolation[rows]
        slope = None if self.slope is None else self.slope.select(rows)
        unmoved = None if self.unmoved is None else self.unmoved[rows]
        return History(self.denoised[rows], extrapolation, slope, unmoved)


class Roughness(NamedTuple):
    """How far each row's Δ have exceeded their budgets in the chain so far.

    Args:
        total: Sum of log(Δ²/budget), shape (N, 1, …), that of a smooth Δ included.
        number: Number of its terms.
    """

    total: Tensor
    number: int


@dataclass(frozen=True)
class InnerState:
    """What the next inner step needs, in tensors of the shape of x_t.

    Args:
        base: x_t / σ_t.
        innovation: e at the current λ, as predicted.
        history: What the corrector and the predictor need; None if the next call needs nothing.
        roughness: What the limiter remembers; None if it has seen no Δ.
    """

    base: Tensor
    innovation: Tensor
    history: History | None = None
    roughness: Roughness | None = None

    def select(self, rows: Tensor) -> InnerState:
        """Return the state of these rows, each with its own history."""
        history, rough = self.history, self.roughness
        history = None if history is None else history.select(rows)
        rough = None if rough is None else rough._replace(total=rough.total[rows])
        return InnerState(self.base[rows], self.innovation[rows], history, rough)


def start(x: Tensor, block: Block) -> InnerState:
    """Return the state in which a chain begins: x itself is the innovation, e = x/σ."""
    scaled = x / block.transition.t.sigma
    return InnerState(base=scaled, innovation=scaled)


def network_input(step: InnerStep, state: InnerState) -> Tensor:
    """Return x_in = σ_t* (cos θ · x_t/σ_t + sin θ · e), a sample of the marginal at t*."""
    sigma = step.level.sigma
    return combination(sigma * step.cos, state.base, sigma * step.sin, state.innovation)


def inner_step(
    block: Block, i: int, state: InnerState, denoised: Tensor, noise: Tensor | None = None
) -> tuple[Tensor, InnerState]:
    """Take the i-th inner step of a transition; after the last step, leave the transition.

        e(λ_i) → e(λ_{i+1})     by  de/dλ = ẑ

    Args:
        block: The transition and the weights of its steps.
        i: Index of the network call that gave ẑ.
        state: The state whose network input that call received. Within a transition its e is
            overwritten, unless a gradient may need that.
        denoised: ẑ_i, shape of x_t.
        noise: Fresh noise ε̄, the initial e of a transition; None to go on from the e of `state`.

    Returns:
        The next network input, or x_t′ at the end of the transition, and the state that belongs
        to it.
    """
    own = i > 0 and may_be_overwritten(state.innovation, denoised)
    state, slope = correct(block.steps[i], state, denoised, own)
    if noise is not None:
        state = replace(state, innovation=noise)
    state = advance(block.steps[i], state, denoised, slope, own)
    if i + 1 < len(block.steps):
        return network_input(block.steps[i + 1], state), state
    return leave(block, state)


def correct(
    step: InnerStep, state: InnerState, denoised: Tensor, own: bool = False
) -> tuple[InnerState, Slope | None]:
    """Correct the step that led to ẑ_i, now that ẑ_i is known; return the state and the slope.

    At λ = 0 that step was the last of the previous transition, and the correction moves x_t
    itself. With `own`, it overwrites e.
    """
    last = state.history
    if last is None or not step.learns:
        return state, None
    change, before = denoised - last.denoised, last.slope
    still = 1.0 if last.unmoved is None else last.unmoved
    genuine = 1.0 if before is None or before.unmoved is None else before.unmoved
    square, kept = _row_mean(change.square()), None
    if before is not None and step.ratio:
        kept = genuine * _over(_row_mean(change * before.change), before.square)
    rough = _roughness(step, square, state.roughness, last.unmoved)
    state, trust = replace(state, roughness=rough), still * _trust(step, square, kept, rough)
    slope = Slope(change, square, trust, last.unmoved)
    if step.correct is None:
        return state, slope
    x = state.innovation if step.sin else state.base
    if last.extrapolation is not None:
        x = _plus(x, -still, last.extrapolation, own)
    weight = step.correct * trust
    if step.curve and before is not None:
        curve = step.curve * genuine * trust
        weight = weight + curve
        x = _plus(x, -curve / step.ratio, before.change, own)
    x = _plus(x, weight, change, own)
    return replace(state, **{"innovation" if step.sin else "base": x}), slope


def advance(
    step: InnerStep, state: InnerState, denoised: Tensor, slope: Slope | None, own: bool = False
) -> InnerState:
    """Return the state at λ_{i+1}, given the denoised mean ẑ_i of this step's network input.

    With `own`, it overwrites e.
    """
    innovation, extrapolation = state.innovation, None
    if step.respond:
        extrapolation = step.respond * innovation
    if step.predict and slope is not None:
        predicted = step.predict * slope.trust * slope.change
        extrapolation = predicted if extrapolation is None else extrapolation + predicted
    if step.keep:
        innovation = _plus(innovation, step.euler, denoised, own)
    else:
        innovation = combination(0.0, innovation, step.euler, denoised)
    if extrapolation is not None:
        innovation = _plus(innovation, 1.0, extrapolation, own)
    history = None
    if step.remember:  # a copy, as the network may reuse its buffer
        history = History(denoised.clone(), extrapolation, slope)
    return replace(state, innovation=innovation, history=history)


def leave(block: Block, state: InnerState) -> tuple[Tensor, InnerState]:
    """Return x_t′ at the end of a transition, and the next initial state, with e to be drawn."""
    chosen = block.transition
    x_next = chosen.next_state(state.base, state.innovation)
    scaled = x_next / (chosen.t_next.sigma or 1.0)
    history = state.history
    if history is not None and history.extrapolation is not None:  # in units of the new base
        scale = chosen.sigma / (chosen.t_next.sigma or 1.0)
        history = history._replace(extrapolation=scale * history.extrapolation)
    return x_next, replace(state, base=scaled, innovation=scaled, history=history)


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
    cos, sin = step.cos / step.level.sigma, step.sin / step.level.sigma
    base = torch.add(state.base, delta, alpha=cos)
    innovation = torch.add(state.innovation, delta, alpha=sin)
    return replace(state, base=base, innovation=innovation, history=history)


def may_be_overwritten(x: Tensor, y: Tensor) -> bool:
    """Return whether x + y may be written over x, a tensor of ours."""
    inference = torch.is_inference_mode_enabled()
    return x.dtype == y.dtype and not x.requires_grad and x.is_inference() == inference


def _plus(x: Tensor, weight: float | Tensor, y: Tensor, own: bool) -> Tensor:
    """Return x + weight · y; with `own` and one weight for all rows, it overwrites x."""
    if isinstance(weight, Tensor):
        return torch.addcmul(x, weight, y)  # vmap has no rule for its variant in place
    return x.add_(y, alpha=weight) if own else torch.add(x, y, alpha=weight)


def _trust(step: InnerStep, square: Tensor, kept: Tensor | None, rough: Roughness) -> Tensor:
    """Return the fraction of each row's Δ that may be extrapolated, in [0, 1], shape (N, 1, …).

    Between two precisions the posterior mean of a standard Gaussian moves by less than the variance
    it gains, which is the unit of the budget. Data of several modes exceed it now and then, strong
    guidance does so at every call: trust falls with the square of the geometric mean of Δ²/budget
    over the chain so far. A smooth path does not turn back, either. Where nothing is trusted the
    step is Euler's. An extrapolation that hardly moves the network's input, as in every short step,
    is trusted in any case.

    Args:
        square: Mean square of Δ.
        kept: Share of the Δ before that Δ keeps, their projection; None if there is none to judge.
        rough: What the limiter remembers, this Δ included.
    """
    beyond = rough.total / rough.number - math.log(step.rough)
    trust = _share(step.budget, square) * (-2 * beyond.clamp(min=0.0)).exp()
    if kept is not None:
        trust = trust * (1 + step.ratio * kept).clamp(0.0, 1.0)
    return torch.maximum(trust, _share(step.harmless, square))


def _roughness(
    step: InnerStep, square: Tensor, before: Roughness | None, unmoved: Tensor | None
) -> Roughness:
    """Return the roughness with this Δ counted, but in rows that the host has moved meanwhile."""
    tiny = torch.finfo(square.dtype).tiny
    excess = (square.clamp(min=tiny).log() - math.log(max(step.budget, tiny))).clamp(-_FAR, _FAR)
    total, number = (math.log(_SMOOTH), 1) if before is None else before
    if unmoved is not None:
        excess = torch.where(unmoved > 0, excess, total / number)
    return Roughness(total + excess, number + 1)


def _share(limit: float, square: Tensor) -> Tensor:
    """Return min(1, limit / square)."""
    numbers = torch.finfo(square.dtype)
    if limit > numbers.max:
        return torch.ones_like(square)
    return limit / square.clamp(min=max(limit, numbers.tiny))


def _over(product: Tensor, square: Tensor) -> Tensor:
    """Return product / square, 0 where the square is 0: there its gradient is 0, too."""
    nothing = square < torch.finfo(square.dtype).tiny
    return product / square.masked_fill(nothing, math.inf)


def _row_mean(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).mean(1).view(-1, *[1] * (x.ndim - 1))
