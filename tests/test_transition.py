import math

import pytest
import torch

from glassflows import RectifiedFlow, VariancePreserving
from glassflows.flow.solver import InnerState, Solver, inner_steps, network_input
from glassflows.flow.transition import ddpm_correlation, first_transition, transition
from oracles import statistic_by_solve

FLOW = RectifiedFlow()
CURVED = VariancePreserving([math.cos(0.01 + 0.155 * n) ** 2 for n in range(10)])


@pytest.mark.parametrize("schedule", [FLOW, CURVED])
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
    step = inner_steps(chosen, [lam], [level], Solver())[0]

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


@pytest.mark.parametrize("schedule", [FLOW, CURVED])
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
    step = inner_steps(chosen, [chosen.lam_start], [now], Solver())[0]
    got = network_input(step, InnerState(x / now.sigma, x / now.sigma))
    torch.testing.assert_close(got, x, rtol=0, atol=1e-12)
    assert chosen.snr(chosen.lam_end) == pytest.approx(then.snr, rel=1e-12)


@pytest.mark.parametrize("rho", [1.1, -1.5, "sde", None])
def test_correlation_is_checked(rho):
    with pytest.raises(ValueError, match="correlation: expected"):
        transition(FLOW.level(0.2), FLOW.level(0.6), rho)
