import math
import re

import pytest
import torch

from glassflows import RectifiedFlow, VarianceExploding, VariancePreserving, renewal
from glassflows.flow.solver import Solver, lay
from glassflows.flow.state import InnerState, network_input
from glassflows.flow.transition import check_correlations, ddpm_correlation, first_transition, transition
from oracles import statistic_by_solve

FLOW = RectifiedFlow()
CURVED = VariancePreserving([math.cos(0.01 + 0.155 * n) ** 2 for n in range(10)])
EXPLODING = VarianceExploding()


@pytest.mark.parametrize("schedule", [FLOW, CURVED, EXPLODING])
@pytest.mark.parametrize("rho", ["ddpm", 0.0, 0.4, 0.9, -0.3])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_network_input_is_gaussian_conditioning(schedule, rho, fraction):
    """x_in = α_t* S with S the sufficient statistic of (x_t, x̄_λ), by an independent 2×2 solve."""
    now, then = schedule.level(0.35), schedule.level(0.6)
    chosen = transition(now, then, rho)
    lam = fraction * chosen.lam_end
    generator = torch.Generator().manual_seed(0)
    x_t, e = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    level = schedule.level(schedule.time(chosen.snr(lam)))
    step = lay(chosen, [lam], [level], Solver()).steps[0]

    # the measurement along the inner path: x̄ = γ̄ x_t + σ̄ e, whose noise has correlation ρ with that of x_t
    value = ddpm_correlation(now, then) if rho == "ddpm" else rho
    gamma, sigma_bar = value * then.sigma / now.sigma, then.sigma
    alpha_bar = gamma * now.alpha + chosen.sigma * lam
    S, precision = statistic_by_solve(
        x_t, gamma * x_t + chosen.sigma * e,
        alpha=now.alpha, sigma=now.sigma, alpha_bar=alpha_bar, sigma_bar=sigma_bar, rho=value,
    )  # fmt: skip
    assert chosen.snr(lam) == pytest.approx(precision, rel=1e-12)
    got = network_input(step, InnerState(x_t / now.sigma, e))
    torch.testing.assert_close(got, level.alpha * S, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", [FLOW, CURVED, EXPLODING])
def test_ddpm_transition_ends_at_its_own_statistic(schedule):
    now, then = schedule.level(0.35), schedule.level(0.6)
    chosen = transition(now, then, "ddpm")
    assert chosen.snr(chosen.lam_end) == pytest.approx(then.snr, rel=1e-12)


def test_other_correlations_overshoot():
    now, then = FLOW.level(0.35), FLOW.level(0.6)
    for rho in (-0.9, 0.0, 0.2, 0.9):
        chosen = transition(now, then, rho)
        assert chosen.snr(chosen.lam_end) > then.snr


@pytest.mark.parametrize("rho", ["ddpm", 0.0, 0.4, -0.3])
def test_transition_to_data_is_the_posterior(rho):
    chosen = transition(FLOW.level(0.5), FLOW.level(1.0), rho)
    assert (chosen.gamma, chosen.alpha, chosen.sigma, chosen.lam_end) == (0.0, 1.0, 0.0, math.inf)


def test_marginals_are_preserved():
    """Cov of x_t′ = γ̄ (α z + σ ε) + ᾱ z + σ̄ ε̄ over z and both noises is that of the schedule."""
    now, then = CURVED.level(0.2), CURVED.level(0.7)
    for rho in ("ddpm", -1.0, 0.0, 0.4, 1.0):
        chosen = transition(now, then, rho)
        assert chosen.gamma * now.alpha + chosen.alpha == pytest.approx(then.alpha, abs=1e-12)
        assert (chosen.gamma * now.sigma) ** 2 + chosen.sigma**2 == pytest.approx(then.sigma**2, abs=1e-12)


def test_first_transition_starts_from_the_latents_themselves():
    now, then = CURVED.level(0.1), CURVED.level(0.6)
    chosen = first_transition(now, then)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = lay(chosen, [chosen.lam_start], [now], Solver()).steps[0]
    got = network_input(step, InnerState(x / now.sigma, x / now.sigma))
    torch.testing.assert_close(got, x, rtol=0, atol=1e-12)
    assert chosen.snr(chosen.lam_end) == pytest.approx(then.snr, rel=1e-12)


@pytest.mark.parametrize("schedule", [FLOW, CURVED, EXPLODING])
def test_limits_of_the_correlation_are_exact(schedule):
    """ρ = 0 forgets x_t, ρ = ±1 draws no noise; no epsilon anywhere."""
    now, then = schedule.level(0.35), schedule.level(0.6)
    independent = transition(now, then, 0.0)
    assert (independent.gamma, independent.alpha, independent.sigma) == (0.0, then.alpha, then.sigma)
    for rho in (1.0, -1.0):
        chosen = transition(now, then, rho)
        assert (chosen.sigma, chosen.lam_end) == (0.0, math.inf)
        assert chosen.gamma == rho * then.sigma / now.sigma


@pytest.mark.parametrize("schedule", [FLOW, CURVED, EXPLODING])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.8])
def test_renewal_renews_its_fraction(schedule, fraction):
    """corr(x_t, x_t′)² = 1 − f on standard Gaussian data, wherever ρ is not cut off at ±1."""
    rule, uncut = renewal(fraction, schedule), 0
    for t, t_next in ((0.2, 0.3), (0.3, 0.6), (0.5, 0.9)):
        now, then, rho = schedule.level(t), schedule.level(t_next), rule(t, t_next)
        covariance = now.alpha * then.alpha + rho * now.sigma * then.sigma
        correlation = covariance / math.hypot(now.alpha, now.sigma) / math.hypot(then.alpha, then.sigma)
        if abs(rho) < 1:
            uncut += 1
            assert correlation**2 == pytest.approx(1 - fraction, abs=1e-12)
        else:
            assert (correlation**2 - (1 - fraction)) * rho <= 0
    assert uncut or fraction == 0.0
    assert rule(0.5, 1.0) == 0.0


def test_renewal_is_checked():
    with pytest.raises(ValueError, match=r"^fraction: expected a number in \[0, 1\], got 1\.2$"):
        renewal(1.2)


EXPECTED = re.escape('correlation: expected "ddpm" or a number in [-1, 1], got ')


@pytest.mark.parametrize("rho", [[0.1, 2.0], {"a": 1}, "<function renewal>", True], ids=str)
def test_correlations_are_checked(rho):
    got = 2.0 if isinstance(rho, list) else rho
    with pytest.raises(ValueError, match=f"^{EXPECTED}{re.escape(repr(got))}"):
        check_correlations(rho)


@pytest.mark.parametrize("rho", [1.1, -1.5, "sde", None])
def test_correlation_is_checked(rho):
    with pytest.raises(ValueError, match=f"^{EXPECTED}{re.escape(repr(rho))}$"):
        transition(FLOW.level(0.2), FLOW.level(0.6), rho)
