"""The weights that integrate the inner ODE de/dλ = ẑ between the network calls of a transition.

An inner step e(λ_i) → e(λ_{i+1}) follows each network call. A block is a transition together
with the weights of its inner steps.

Between two calls ẑ is taken to be a polynomial in ψ(λ) = atan2(a, λ), with a = √(1 + P_t):
smooth in λ at 0 and in 1/λ at data. The predictor extrapolates the line through the last two ẑ.
When the next ẑ arrives, the corrector replaces that line by the parabola through all three,
without a further call (as UniPC does). All weights are integrals over λ, computed once as floats.

The rules at a boundary (the start of a transition) and the limits of extrapolation were chosen by
measurement; docs/solvers.md has the tables and the reasons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypedDict

import numpy as np

from ..signatures import described
from .noise import NoiseLevel
from .transition import Transition

InnerGrid = Literal["time", "condot"]
Boundary = Literal["discard", "correct", "reuse"]


class Variable(Protocol):
    """A function ψ of λ in which ẑ is taken to be a polynomial; 0 at data (λ = ∞)."""

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
        growth = (end - start) * (end + start) / (self.scale**2 + start**2)
        return end * (self(end) - self(start)) + self.scale / 2 * math.log1p(growth)


@dataclass(frozen=True, repr=False)
class Solver:
    """How the inner ODE is integrated; the options after the first three serve measurements.

    `variable`, `response` and `trust` assume data of unit variance, as latents have.

    Args:
        order: 1 for Euler, 2 for the two-step predictor. All other options except `grid` concern
            order 2.
        corrector: Whether each step is corrected when the ẑ at its end is known.
        grid: Where the calls of a transition lie: "time" evenly on the grid of network times,
            "condot" at the paper's uniform s.
        curved: Whether the corrector follows the parabola through the last three ẑ, not a line.
        variable: Makes ψ from P_t.
        last_step: Fraction of the way to data over which ẑ is extrapolated in the step to data.
        boundary: Use of a transition's last ẑ in the next transition. "discard": none. "correct":
            the first call corrects x_t. "reuse": in transitions of two calls, the first step is
            also predicted from it.
        response: Change of ẑ that is expected from fresh noise in the first of several steps of a
            transition, as a share of the Gaussian posterior variance 1/(1 + P_t).
        trust: Mean squared change of ẑ between two calls that is extrapolated in full in a smooth
            chain, in units of the change for Gaussian data; infinite for no limit.
        rough: Mean squared change, in units of the former and as a geometric mean over the chain
            so far, up to which the chain is smooth; beyond it trust falls with the square. Infinite
            for no memory.
        reach: Shift of the network's input, in units of its noise, below which an extrapolation is
            always trusted.

    Raises:
        ValueError: if `order` is neither 1 nor 2, `grid` is neither "time" nor "condot", or `rough`
            is not above 0.
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
    rough: float = 0.5
    reach: float = 0.02

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(
                f"solver_order: expected 1 (Euler) or 2 (two-step), got {self.order!r}"
            )
        if self.grid not in ("time", "condot"):
            raise ValueError(f'inner_grid: expected "time" or "condot", got {self.grid!r}')
        if not self.rough > 0:
            raise ValueError(f"rough: expected a number above 0, got {self.rough!r}")

    def __repr__(self) -> str:
        return described(self)

    def with_options(self, options: SolverOptions) -> Solver:
        """Return the solver with some of its options replaced, by their names in `SolverOptions`.

        Raises:
            TypeError: if `SolverOptions` has no option of a name.
        """
        if unknown := set(options) - _FIELDS.keys():
            raise TypeError(
                f"unexpected keyword argument {', '.join(sorted(unknown))}: expected a name in the "
                f"signature, or one of {', '.join(_FIELDS)}"
            )
        return replace(self, **{_FIELDS[name]: value for name, value in options.items()})


class SolverOptions(TypedDict, total=False):
    """The options of a `Solver` that users set most often, by their names in calls and configs."""

    solver_order: int
    corrector: bool
    inner_grid: InnerGrid


_FIELDS = {"solver_order": "order", "corrector": "corrector", "inner_grid": "grid"}
_GAUSS = list(zip(*(column.tolist() for column in np.polynomial.legendre.leggauss(8)), strict=True))


@dataclass(frozen=True)
class InnerStep:
    """One network call and the inner step e(λ_i) → e(λ_{i+1}) that follows it.

    Δ stands for ẑ_i − ẑ_{i−1}, and the last step for the step that led to this call.

    Args:
        level: Noise level t* of the network input.
        cos: √(P_t / P), weight of x_t/σ_t in the network input.
        sin: λ/√P, weight of e in the network input.
        keep: Weight of e: 1, or 0 in the step to data, where e becomes ẑ itself.
        euler: Weight of ẑ_i: λ_{i+1} − λ_i, or 1 in the step to data.
        remember: Whether the next call may use ẑ_i.
        respond: Weight of e in the extrapolation, for the response of ẑ to fresh noise.
        predict: Weight of Δ in the extrapolation.
        correct: Weight of Δ in the correction of the last step; None for no correction.
        curve: Weight, in that correction, of the change of Δ since the previous Δ, at equal steps
            of ψ.
        budget: Mean square of Δ that is trusted in full in a smooth chain.
        rough: Geometric mean of Δ²/budget over the chain so far, above which it is trusted less.
        harmless: Mean square of Δ below which its extrapolation hardly moves the network's input.
        ratio: Length in ψ of the last step but one, relative to the last step; 0 if there is none
            in the same transition.
    """

    level: NoiseLevel
    cos: float
    sin: float
    keep: float
    euler: float
    remember: bool = False
    respond: float = 0.0
    predict: float = 0.0
    correct: float | None = None
    curve: float = 0.0
    budget: float = math.inf
    rough: float = math.inf
    harmless: float = 0.0
    ratio: float = 0.0

    @property
    def learns(self) -> bool:
        """Whether Δ is used, to correct the last step or to predict this one."""
        return self.correct is not None or self.predict != 0


@dataclass(frozen=True)
class Block:
    """A transition and its inner steps.

    Args:
        transition: The transition's coefficients.
        steps: Its n network calls and inner steps.
        lams: λ_0 … λ_{n−1} of the calls, and λ̄.
        variable: ψ.
    """

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
    """Lay the inner steps of a transition whose network calls are at given λ and noise levels.

    Args:
        chosen: The transition.
        lams: λ_0 … λ_{n−1} of its n network calls.
        levels: Noise levels t* of the calls.
        solver: How the inner ODE is integrated.
        previous: The previous block, if its last ẑ may serve this one.
    """
    psi = solver.variable(chosen.base_snr)
    ends, second_order = [*lams[1:], chosen.lam_end], solver.order == 2
    steps: list[InnerStep] = []
    for i, (lam, end) in enumerate(zip(lams, ends, strict=True)):
        cos, sin = chosen.weights(lam)
        to_data, weights = math.isinf(end), {}
        if second_order and i > 0:
            weights = _learning(psi, lams, i, sin, levels[i - 1], levels[i], solver)
            ahead = -psi(lam) * solver.last_step if to_data else psi.integral(lam, end)
            weights["predict"] = ahead / (psi(lam) - psi(lams[i - 1]))
        elif second_order and lam == 0:
            weights = _boundary(chosen, lams, previous, solver)
            if len(lams) > 1:
                variance = 1 / (1 + chosen.base_snr)
                weights["respond"] = math.sqrt(1 + solver.response * end**2 * variance) - 1
        keep, euler = (0.0, 1.0) if to_data else (1.0, end - lam)
        followed = i + 1 < len(lams) or (_is_continued(lams, solver) and not to_data)
        remember = second_order and followed
        steps.append(InnerStep(levels[i], cos, sin, keep, euler, remember, **weights))
    return Block(chosen, tuple(steps), (*lams, chosen.lam_end), psi)


def _is_continued(lams: Sequence[float], solver: Solver) -> bool:
    """Return whether the next transition may use the last ẑ of one with calls at these λ.

    Transitions of one call are left alone, because they are DDPM's ancestral steps.
    """
    return solver.boundary != "discard" and len(lams) > 1


def _boundary(
    chosen: Transition, lams: Sequence[float], previous: Block | None, solver: Solver
) -> dict[str, Any]:
    """Return the weights with which a transition's first call corrects the previous transition.

    If the previous inner ODE ended at the precision of x_t itself (ρ_DDPM), the ẑ of this call
    is also the ẑ at the end of that ODE; otherwise no weights are returned.
    """
    if previous is None or not _is_continued(previous.lams[:-1], solver):
        return {}
    before, psi = previous.transition, previous.variable
    if not math.isclose(before.snr(before.lam_end), chosen.base_snr, rel_tol=1e-9):
        return {}
    last, end = previous.lams[-2:]
    # a cut transition may have made its last call at its end, or beyond
    if last > end * (1 - 1e-6):
        return {}
    start, sin = previous.steps[-1].level, before.weights(end)[1]
    scale = before.sigma / chosen.t.sigma
    weights = _learning(
        psi, previous.lams, len(previous.steps), sin, start, chosen.t, solver, scale
    )
    if solver.boundary == "reuse" and len(lams) == 2:
        # ẑ linear in the noise angle φ = atan2(σ, α), integrated by Simpson's rule
        now, middle, then = (
            math.atan2(1, math.sqrt(chosen.snr(lam))) for lam in (0.0, lams[1] / 2, lams[1])
        )
        past = math.atan2(start.sigma, start.alpha)
        weights["predict"] = lams[1] / 6 * (4 * (middle - now) + then - now) / (now - past)
    return weights


def _learning(
    psi: Variable,
    lams: Sequence[float],
    i: int,
    sin: float,
    start: NoiseLevel,
    end: NoiseLevel,
    solver: Solver,
    scale: float = 1.0,
) -> dict[str, Any]:
    """Return the weights with which a call judges and corrects the step that led to it.

    Args:
        psi: Variable of the transition that the step belongs to.
        lams: λ of that transition's calls, and λ̄.
        i: The step leads from λ_{i−1} to λ_i.
        sin: Weight of e in the network input at the end of the step.
        start: Noise level at the start of the step.
        end: Noise level at its end.
        solver: How the inner ODE is integrated.
        scale: Factor from e to the corrected quantity: 1 for e itself.
    """
    span = psi(lams[i]) - psi(lams[i - 1])
    weight, third = psi.integral(lams[i - 1], lams[i]) / span, i > 1
    return {
        "harmless": (solver.reach / (sin * weight)) ** 2,
        "correct": scale * weight if solver.corrector else None,
        "budget": _budget(start, end, solver),
        "rough": solver.rough,
        "ratio": (psi(lams[i - 1]) - psi(lams[i - 2])) / span if third else 0.0,
        "curve": scale * _curve(psi, lams, i)
        if third and solver.corrector and solver.curved
        else 0.0,
    }


def _curve(psi: Variable, lams: Sequence[float], i: int) -> float:
    """Return the weight `curve`, which makes the corrected step to λ_i quadratic in ψ.

    The weight multiplies Δ_i − Δ_{i−1} · span_i / span_{i−1}. The third call also makes
    the first step quadratic, because that step has no ẑ before it. On the scale √P it is the
    longest step.
    """

    def integral(start: float, end: float) -> float:  # ∫ (ψ − ψ(start)) (ψ − ψ(end)) dλ
        half, first, last, total = (end - start) / 2, psi(start), psi(end), 0.0
        for node, weight in _GAUSS:
            value = psi(start + half * (1 + node))
            total += weight * (value - first) * (value - last)
        return half * total

    first, middle, last = lams[i - 2 : i + 1]
    weight = integral(middle, last) + (integral(first, middle) if i == 2 else 0.0)
    return weight / (psi(last) - psi(first)) / (psi(last) - psi(middle))


def _budget(start: NoiseLevel, end: NoiseLevel, solver: Solver) -> float:
    """Return the mean squared change of ẑ that is trusted in full.

    It is `trust` times the change for a standard Gaussian, 1/(1+P) − 1/(1+P′).
    """
    return solver.trust * (1 / (1 + start.snr) - 1 / (1 + end.snr))
