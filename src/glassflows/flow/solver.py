"""The weights that integrate the inner ODE de/dλ = ẑ between the network calls of a transition.

Between calls ẑ is a polynomial in ψ(λ) = atan2(a, λ), a = √(1 + P_t): smooth in λ at 0 and in 1/λ at data.
The predictor extrapolates the line through the last two ẑ; when the next ẑ arrives, the corrector replaces it by the
parabola through all three, at no further call (as UniPC does). All weights are integrals over λ, floats made once.

What happens where a transition begins, and how far an extrapolation is trusted, was decided by measurement:
docs/solvers.md has the tables and the reasons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from .noise import NoiseLevel
from .transition import Transition

InnerGrid = Literal["time", "condot"]
Boundary = Literal["discard", "correct", "reuse"]


class Variable(Protocol):
    """A function of λ in which ẑ is taken linear between two calls; 0 at data (λ = ∞)."""

    def __call__(self, lam: float) -> float: ...

    def integral(self, start: float, end: float) -> float:
        """Return ∫ (ψ(λ) − ψ(start)) dλ from start to end."""
        ...


@dataclass(frozen=True)
class Angle:
    """ψ(λ) = atan2(a, λ) with a = √(1 + P_t)."""

    scale: float

    @classmethod
    def on(cls, base_snr: float) -> Angle:
        """Return the variable of a transition whose base has precision P_t."""
        return cls(math.sqrt(1 + base_snr))

    def __call__(self, lam: float) -> float:
        return math.atan2(self.scale, lam)

    def integral(self, start: float, end: float) -> float:
        def primitive(lam: float) -> float:
            return lam * self(lam) + self.scale / 2 * math.log(self.scale**2 + lam**2)

        return primitive(end) - primitive(start) - self(start) * (end - start)


@dataclass(frozen=True)
class Solver:
    """How the inner ODE is integrated; all but the first three options are there to be measured.

    Where a scale of the data matters (`variable`, `response`, `trust`) it is that of unit variance, as latents have.

    Args:
        order: 1 for Euler, 2 for the two-step predictor. The options below concern order 2.
        corrector: Correct each step once its end has been evaluated, along a line or, if `curved`, along a parabola
            through the last three ẑ.
        grid: Where the calls of a transition lie: "time" evenly on the grid of network times, "condot" at the paper's
            uniform s.
        variable: Makes ψ from P_t.
        last_step: Fraction of the way to data over which ẑ is extrapolated in the step that ends there.
        boundary: What the last ẑ of a transition does in the next: "discard" nothing, "correct" the state that led
            there, "reuse" also predict the first step of transitions with two calls.
        response: Share of the Gaussian posterior variance 1/(1 + P_t) with which fresh noise moves ẑ in the first of
            several steps of a transition, before a second call has shown it.
        trust: Mean squared change of ẑ between two calls, in units of that of Gaussian data, up to which it is
            extrapolated in full; infinite switches the limiter off.
        reach: Shift of the network's input, in units of its noise, up to which an extrapolation is harmless anyway.

    Raises:
        ValueError: if the order is neither 1 nor 2, or there is no grid of that name.
    """

    order: int = 2
    corrector: bool = True
    grid: InnerGrid = "time"
    curved: bool = True
    variable: Callable[[float], Variable] = Angle.on
    last_step: float = 0.5
    boundary: Boundary = "reuse"
    response: float = 0.3
    trust: float = 4.0
    reach: float = 0.02

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"solver_order: expected 1 (Euler) or 2 (two-step), got {self.order!r}")
        if self.grid not in ("time", "condot"):
            raise ValueError(f'inner_grid: expected "time" or "condot", got {self.grid!r}')


@dataclass(frozen=True)
class InnerStep:
    """One network call and the inner step that follows it, e(λ_i) → e(λ_{i+1}). Δ stands for ẑ_i − ẑ_{i−1}.

    Args:
        level: Noise level t* of the network input.
        cos: √(P_t / P), weight of x_t/σ_t in the network input; `sin` = λ/√P that of e.
        keep: Weight of e; 1, or 0 in the step to data, where e becomes ẑ itself.
        euler: Weight of ẑ_i; λ_{i+1} − λ_i, or 1 in the step to data.
        respond: Weight of e in the extrapolation: how the fresh noise will have moved ẑ.
        predict: Weight of Δ in the extrapolation.
        correct: Weight of Δ in the corrected step that led here; None where it stays uncorrected.
        curve: Weight in it of what Δ has changed by since the Δ before, at equal steps of ψ.
        budget: Mean square of Δ up to which a posterior mean may move.
        harmless: Mean square of Δ up to which its extrapolation hardly moves the network's input.
        ratio: Length in ψ of the step before the one that led here, relative to it; 0 where they are not comparable.
    """

    level: NoiseLevel
    cos: float
    sin: float
    keep: float
    euler: float
    respond: float = 0.0
    predict: float = 0.0
    correct: float | None = None
    curve: float = 0.0
    budget: float = math.inf
    harmless: float = 0.0
    ratio: float = 0.0


@dataclass(frozen=True)
class Block:
    """A transition and its inner steps; `lams` are the λ of its calls and λ̄."""

    transition: Transition
    steps: tuple[InnerStep, ...]
    lams: tuple[float, ...]
    variable: Variable


def lay(
    chosen: Transition,
    lams: Sequence[float],
    levels: Sequence[NoiseLevel],
    solver: Solver,
    previous: Block | None = None,
) -> Block:
    """Lay the inner steps of a transition whose n network calls lie at λ_0 … λ_{n−1}, at noise levels t*.

    Args:
        previous: The transition before, where this one may learn from it.
    """
    psi = solver.variable(chosen.base_snr)
    ends = [*lams[1:], chosen.lam_end]
    steps: list[InnerStep] = []
    for i, (lam, end) in enumerate(zip(lams, ends, strict=True)):
        theta = chosen.angle(lam)
        to_data = math.isinf(end)
        keep, euler = (0.0, 1.0) if to_data else (1.0, end - lam)
        step = InnerStep(levels[i], math.cos(theta), math.sin(theta), keep, euler)
        if solver.order == 2 and i > 0:
            span = psi(lam) - psi(lams[i - 1])
            step = replace(
                step,
                predict=(-psi(lam) * solver.last_step if to_data else psi.integral(lam, end)) / span,
                **_learning(psi, lams[: i + 1], step.sin, levels[i - 1], levels[i], solver),
            )
        elif solver.order == 2 and lam == 0:
            step = replace(step, **_boundary(chosen, lams, previous, solver))
            if len(lams) > 1:
                step = replace(step, respond=math.sqrt(1 + solver.response * end**2 / (1 + chosen.base_snr)) - 1)
        steps.append(step)
    return Block(chosen, tuple(steps), (*lams, chosen.lam_end), psi)


def _boundary(chosen: Transition, lams: Sequence[float], previous: Block | None, solver: Solver) -> dict[str, Any]:
    """Return the weights of the first call of a transition that concern the last step of the one before.

    Where the inner ODE ended at the precision of x_t itself (ρ_DDPM), the ẑ of this call is also the ẑ at its end.
    Transitions of one call are left alone: they are DDPM's ancestral steps.
    """
    if solver.boundary == "discard" or previous is None or len(previous.steps) == 1:
        return {}
    before, psi = previous.transition, previous.variable
    if not math.isclose(before.snr(before.lam_end), chosen.base_snr, rel_tol=1e-9):
        return {}
    last, end = previous.lams[-2:]
    if last > end * (1 - 1e-6):  # a cut transition may have made its last call at its end, or beyond
        return {}
    scale, sin = before.sigma / chosen.t.sigma, math.sin(before.angle(end))
    weights = _learning(psi, previous.lams, sin, previous.steps[-1].level, chosen.t, solver, scale)
    if solver.boundary == "reuse" and len(lams) == 2:  # ẑ linear in the noise angle φ = atan2(σ, α); Simpson's rule
        now, middle, then = (math.atan2(1, math.sqrt(chosen.snr(lam))) for lam in (0.0, lams[1] / 2, lams[1]))
        past = math.atan2(previous.steps[-1].level.sigma, previous.steps[-1].level.alpha)
        weights["predict"] = lams[1] / 6 * (4 * (middle - now) + then - now) / (now - past)
    return weights


def _learning(
    psi: Variable,
    lams: Sequence[float],
    sin: float,
    start: NoiseLevel,
    end: NoiseLevel,
    solver: Solver,
    scale: float = 1.0,
) -> dict[str, Any]:
    """Return the weights by which a call learns of the step that led to it, to the last of `lams`."""
    span = psi(lams[-1]) - psi(lams[-2])
    weight, third = psi.integral(lams[-2], lams[-1]) / span, len(lams) > 2
    return {
        "harmless": (solver.reach / (sin * weight)) ** 2,
        "correct": scale * weight if solver.corrector else None,
        "budget": _budget(start, end, solver),
        "ratio": (psi(lams[-2]) - psi(lams[-3])) / span if third else 0.0,
        "curve": scale * _curve(psi, lams) if third and solver.corrector and solver.curved else 0.0,
    }


def _curve(psi: Variable, lams: Sequence[float]) -> float:
    """Weight of Δ_i − Δ_{i−1} · span_i / span_{i−1} that makes the corrected step quadratic in ψ.

    The third call also makes the first step so, which has no ẑ before it: steps are longest there, √P being its scale.
    """

    def integral(start: float, end: float) -> float:  # ∫ (ψ − ψ(start)) (ψ − ψ(end)) dλ
        nodes, weights = np.polynomial.legendre.leggauss(8)
        half = (end - start) / 2
        values = [psi(start + half * (1 + node)) for node in nodes]
        return half * sum(w * (v - psi(start)) * (v - psi(end)) for w, v in zip(weights, values, strict=True))

    *_, first, middle, last = lams
    weight = integral(middle, last) + (integral(first, middle) if len(lams) == 3 else 0.0)
    return float(weight / (psi(last) - psi(first)) / (psi(last) - psi(middle)))


def _budget(start: NoiseLevel, end: NoiseLevel, solver: Solver) -> float:
    """Mean squared change of ẑ that is trusted: `trust` times that of a standard Gaussian, 1/(1+P) − 1/(1+P′)."""
    return solver.trust * (1 / (1 + start.snr) - 1 / (1 + end.snr))
