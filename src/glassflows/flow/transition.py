"""One GLASS transition x_t → x_t′ (arXiv:2509.25170) in innovation form.

Given z and x_t, the next state is Gaussian with a noise correlation ρ to the current one:

    x_t′ = γ̄ x_t + ᾱ z + σ̄ ε̄

    γ̄ = ρ σ_t′/σ_t,   ᾱ = α_t′ − γ̄ α_t,   σ̄² = σ_t′² (1 − ρ²)

The innovation e = λ z + ε̄ is a second measurement of z, independent of x_t. Its precision λ²
grows from 0 (pure noise) to λ̄² = (ᾱ/σ̄)². Precisions add: the two measurements together
are one ordinary network input, of precision P_t + λ².
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

from torch import Tensor

from .denoise import combination
from .noise import NoiseLevel, NoiseSchedule, RectifiedFlow

Correlation = float | Literal["ddpm"]
Correlations = Correlation | Sequence[Correlation] | Callable[[float, float], Correlation]


@dataclass(frozen=True)
class Transition:
    """The coefficients of one transition, floats known before its first network call.

    Args:
        t: Noise level of the current state x_t.
        t_next: Noise level of the next state x_t′.
        gamma: γ̄, weight of x_t in x_t′.
        alpha: ᾱ, weight of the clean sample z in x_t′.
        sigma: σ̄, weight of fresh noise ε̄ in x_t′; 0 if x_t′ is a function of x_t and z.
        base_snr: Precision of z that x_t contributes: P_t, or 0 in the first transition of a chain.
        lam_start: Initial λ of the innovation: 0, or √P_t in the first transition of a chain.
    """

    t: NoiseLevel
    t_next: NoiseLevel
    gamma: float
    alpha: float
    sigma: float
    base_snr: float
    lam_start: float

    @property
    def lam_end(self) -> float:
        """λ̄ = ᾱ/σ̄; infinite where σ̄ = 0."""
        return self.alpha / self.sigma if self.sigma else math.inf

    def snr(self, lam: float) -> float:
        """P(λ) = P_t + λ², precision of z given x_t and the innovation at λ."""
        return self.base_snr + lam**2

    def lam(self, snr: float) -> float:
        """λ at which the precision of z is `snr`, the inverse of `snr(lam)`."""
        return math.sqrt(max(snr - self.base_snr, 0.0))

    def weights(self, lam: float) -> tuple[float, float]:
        """cos θ = √(P_t / P) and sin θ = λ / √P at λ; (1, 0) at λ = 0."""
        if math.isinf(lam):
            return 0.0, 1.0
        root = math.sqrt(self.base_snr)
        length = math.hypot(root, lam)
        return (root / length, lam / length) if lam else (1.0, 0.0)

    def next_state(self, base: Tensor, innovation: Tensor) -> Tensor:
        """Return x_t′ = γ̄ x_t + σ̄ e(λ̄), or γ̄ x_t + ᾱ ẑ where σ̄ = 0.

        Args:
            base: x_t/σ_t.
            innovation: e(λ̄), or ẑ where σ̄ = 0.
        """
        return combination(self.gamma * self.t.sigma, base, self.sigma or self.alpha, innovation)


def ddpm_correlation(t: NoiseLevel, t_next: NoiseLevel) -> float:
    """Return ρ_DDPM = α_t σ_t′ / (σ_t α_t′), the ρ of DDPM's reverse transition."""
    return t.alpha * t_next.sigma / (t.sigma * t_next.alpha)


def transition(t: NoiseLevel, t_next: NoiseLevel, correlation: Correlation) -> Transition:
    """Return the transition from t to t′ with noise correlation ρ.

    Raises:
        ValueError: if the correlation is neither "ddpm" nor a number in [-1, 1].

    Reference:
        arXiv:2509.25170, Proposition 1.
    """
    rho = check_correlation(correlation)
    if rho == "ddpm":
        rho = ddpm_correlation(t, t_next)
    gamma = rho * t_next.sigma / t.sigma
    return Transition(
        t,
        t_next,
        gamma=gamma,
        alpha=t_next.alpha - gamma * t.alpha,
        sigma=t_next.sigma * math.sqrt(1 - rho**2),
        base_snr=t.snr,
        lam_start=0.0,
    )


def first_transition(t: NoiseLevel, t_next: NoiseLevel) -> Transition:
    """Return the transition out of the initial latents of a chain.

    The initial latents hold noise (and signal) already, so they themselves are the innovation:
    e = x_t/σ_t at λ = √P_t, on a base of precision 0. Nothing is drawn, and the transition is
    the plain ODE for every correlation.
    """
    return Transition(
        t,
        t_next,
        gamma=0.0,
        alpha=t_next.alpha,
        sigma=t_next.sigma,
        base_snr=0.0,
        lam_start=t.root_snr,
    )


def check_correlation(correlation: Correlation) -> Correlation:
    """Return the correlation if it is "ddpm" or a number in [-1, 1]; raise ValueError otherwise."""
    if isinstance(correlation, str):
        valid = correlation == "ddpm"
    else:
        valid = (
            isinstance(correlation, Real)
            and not isinstance(correlation, bool)
            and -1 <= correlation <= 1
        )
    if valid:
        return correlation
    raise ValueError(f'correlation: expected "ddpm" or a number in [-1, 1], got {correlation!r}')


def check_correlations(correlation: Correlations) -> Correlations:
    """Return the correlation of a chain: one value, a list of values, or a function of t and t′.

    Raises:
        ValueError: if a value is neither "ddpm" nor a number in [-1, 1].
    """
    if callable(correlation):
        return correlation
    if isinstance(correlation, (list, tuple)):
        return [check_correlation(one) for one in correlation]
    try:
        return check_correlation(correlation)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(
            f"{error}, or a list with one per transition, or a function of t and t′ "
            "(which a config does not save: pass it again)"
        ) from None


def correlation_at(
    correlation: Correlations, k: int, num_transitions: int, t: float, t_next: float
) -> Correlation:
    """Return the correlation of transition k of a chain, from t to t′.

    Raises:
        ValueError: if a list does not have one value per transition, or a function returns a value
            that is not valid.
    """
    if callable(correlation):
        correlation = correlation(t, t_next)
    elif isinstance(correlation, (list, tuple)):
        if len(correlation) != num_transitions:
            raise ValueError(
                f"correlation: expected one per transition, {num_transitions}, got a list of "
                f"{len(correlation)} (that of the first transition counts, but is not used)"
            )
        correlation = correlation[k]
    return check_correlation(correlation)  # type: ignore[arg-type]


def renewal(
    fraction: float,
    schedule: NoiseSchedule = RectifiedFlow(),  # noqa: B008 (frozen)
) -> Callable[[float, float], float]:
    """Return the rule (t, t′) ↦ ρ that renews a fixed fraction of the variance of ẑ.

        ρ = (√(1 − f) √(α_t² + σ_t²) √(α_t′² + σ_t′²) − α_t α_t′) / (σ_t σ_t′)

    The rule cuts ρ off at ±1. For standard Gaussian data ẑ is a multiple of x_t. The share of
    the variance of the next ẑ that x_t does not explain is then 1 − corr(x_t, x_t′)², and
    the rule sets this share to f. ρ_DDPM sets it to 1 − P_t (1 + P_t′) / (P_t′ (1 + P_t)):
    nearly all at noise, little near data.

    Args:
        fraction: f in [0, 1]; 0 keeps, and 1 renews, as much as |ρ| ≤ 1 allows.
        schedule: The model's noise schedule; for a pipeline with a discrete table
            `VariancePreserving(pipe.scheduler.alphas_cumprod)`.

    Raises:
        ValueError: if the fraction is not in [0, 1].

    Example:
        >>> from glassflows import renewal
        >>> round(renewal(0.5)(0.4, 0.6), 3)
        0.532
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: expected a number in [0, 1], got {fraction!r}")

    def rule(t: float, t_next: float) -> float:
        now, then = schedule.level(t), schedule.level(t_next)
        if then.sigma == 0:
            return 0.0  # at data every ρ is the same transition
        spread = math.hypot(now.alpha, now.sigma) * math.hypot(then.alpha, then.sigma)
        rho = (math.sqrt(1 - fraction) * spread - now.alpha * then.alpha) / (now.sigma * then.sigma)
        return min(max(rho, -1.0), 1.0)

    return rule


def check_num_transitions(num_transitions: int) -> int:
    """Return the number of transitions if it is an integer ≥ 1; raise ValueError otherwise."""
    whole = isinstance(num_transitions, Integral) and not isinstance(num_transitions, bool)
    if not whole or num_transitions < 1:
        raise ValueError(f"num_transitions: expected at least 1, got {num_transitions!r}")
    return num_transitions
