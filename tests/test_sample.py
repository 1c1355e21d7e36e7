from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from glassflows import VariancePreserving, sample, sample_posterior, sample_transition
from glassflows.flow.transition import ddpm_correlation
from oracles import GaussianMixture, reference

LAW, CASES = reference()
DIRECTION = torch.tensor([0.6, -0.5, 0.3], dtype=torch.float64)
ALPHA = 1e-5  # level of the tests of law


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['t']}-{case['t_next']}-{case['correlation']}")
def test_published_transitions(case):
    x_next = sample_transition(
        LAW, case["x_t"], case["t"], case["t_next"],
        num_steps=case["num_steps"], correlation=case["correlation"], noise=case["noise"],
        inner_grid="condot", solver_order=1, corrector=False,
    )  # fmt: skip
    torch.testing.assert_close(x_next, case["x_next"], rtol=0, atol=1e-8)


def transition_pvalue(rho, t_next, *, claimed=None, **options):
    """KS test of transitions from one x_t against the exact law of x_t′ given x_t with correlation `claimed`."""
    x_t = torch.tensor([[0.2, 0.7, -0.3]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = sample_transition(
        LAW, x_t.expand(20_000, -1), 0.4, t_next, num_steps=60, correlation=rho, generator=generator, **options
    )
    value = ddpm_correlation(LAW.schedule.level(0.4), LAW.schedule.level(t_next)) if rho == "ddpm" else rho
    claimed = value if claimed is None else claimed(value)
    cdf = LAW.transition_cdf(x_t, 0.4, t_next, claimed, DIRECTION)
    return kstest((drawn @ DIRECTION).numpy(), cdf).pvalue


@pytest.mark.parametrize("rho", [0.0, 0.4, "ddpm", 0.9, -0.3])
def test_law_of_transition(rho):
    assert transition_pvalue(rho, 0.7) > ALPHA


def test_law_of_posterior():
    assert transition_pvalue("ddpm", 1.0) > ALPHA


def test_law_rejects_a_wrong_correlation():
    assert transition_pvalue(0.4, 0.7, claimed=lambda rho: rho**2) < ALPHA


def test_law_rejects_euler_with_few_steps():
    """The test of law is sharp enough to see the error of a coarse solver."""
    x_t = torch.tensor([[0.2, 0.7, -0.3]], dtype=torch.float64).expand(20_000, -1)
    drawn = sample_transition(
        LAW, x_t, 0.4, 1.0, num_steps=3, solver_order=1, generator=torch.Generator().manual_seed(0)
    )
    cdf = LAW.transition_cdf(x_t[:1], 0.4, 1.0, 0.0, DIRECTION)
    assert kstest((drawn @ DIRECTION).numpy(), cdf).pvalue < ALPHA


@pytest.mark.parametrize("num_transitions", [1, 3, 8])
@pytest.mark.parametrize("rho", ["ddpm", 0.1])
def test_chains_preserve_the_data_law(num_transitions, rho):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(10_000, 3, generator=generator, dtype=torch.float64)
    drawn = sample(LAW, x, num_steps=96, num_transitions=num_transitions, correlation=rho, generator=generator)
    true = LAW.sample(10_000, generator)
    assert kstest((drawn @ DIRECTION).numpy(), (true @ DIRECTION).numpy()).pvalue > ALPHA


@pytest.mark.parametrize("t", [0.0, 0.2])
def test_one_transition_is_the_ode_sampler(t):
    """Euler on the flow's own ODE dx/dt = (ẑ − x)/(1 − t), written independently."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = np.linspace(t, 1, 9)
    expected = x
    for now, then in pairwise(times):
        expected = expected + (then - now) * (LAW(expected, now) - expected) / (1 - now)
    got = sample(LAW, x, num_steps=8, num_transitions=1, times=times.tolist(), solver_order=1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_one_call_per_transition_is_the_ddpm_posterior_step():
    """x_t′ ~ q(x_t′ | x_t, z = ẑ) of DDPM (arXiv:2006.11239, equation 7), on a table, written independently."""
    table = np.linspace(0.98, 0.02, 40)
    law = GaussianMixture(LAW.means, LAW.weights, LAW.std, VariancePreserving(table))
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    n, m = 25, 14  # entries of the table: x_n → x_m
    t, t_next = 1 - (n + 1) / 40, 1 - (m + 1) / 40
    z = law(x, t)
    ratio = table[n] / table[m]
    mean = table[m] ** 0.5 * (1 - ratio) * z + ratio**0.5 * (1 - table[m]) * x
    deviation = ((1 - table[m]) * (1 - ratio) / (1 - table[n])) ** 0.5
    expected = mean / (1 - table[n]) + deviation * noise
    got = sample_transition(law, x, t, t_next, num_steps=1, schedule=law.schedule, noise=noise)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rho", [1.0, -1.0])
def test_deterministic_given_z(rho):
    """ρ = ±1: x_t′ = γ̄ x_t + ᾱ z with z from the posterior, and no noise of its own."""
    x_t = torch.tensor([[0.2, 0.7, -0.3]], dtype=torch.float64).expand(20_000, -1)
    drawn = sample_transition(
        LAW, x_t, 0.4, 0.7, num_steps=60, correlation=rho, generator=torch.Generator().manual_seed(0)
    )
    cdf = LAW.transition_cdf(x_t[:1], 0.4, 0.7, rho, DIRECTION)
    assert kstest((drawn @ DIRECTION).numpy(), cdf).pvalue > ALPHA


def test_odd_shapes_and_reproducibility():
    x = torch.randn(5, 3, 6, 10, generator=torch.Generator().manual_seed(0))

    def gaussian(x, t):
        assert x.shape == (5, 3, 6, 10)
        return t * x / (t**2 + (1 - t) ** 2)

    draws = [
        sample(gaussian, x, num_steps=7, num_transitions=3, generator=torch.Generator().manual_seed(1)) for _ in "ab"
    ]
    assert draws[0].dtype == torch.float32
    assert torch.equal(*draws)


def test_posterior_ignores_the_correlation():
    x, noise = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = sample_posterior(LAW, x, 0.4, num_steps=6, noise=noise)
    for rho in (0.0, 0.7, "ddpm"):
        other = sample_transition(LAW, x, 0.4, 1.0, num_steps=6, noise=noise, correlation=rho)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_bad_input():
    x = torch.zeros(5, 3)
    with pytest.raises(ValueError, match="expected 0 ≤ t < t_next ≤ 1"):
        sample_transition(LAW, x, 0.6, 0.4, num_steps=2)
    with pytest.raises(ValueError, match="num_steps: expected at least 1"):
        sample_transition(LAW, x, 0.2, 0.4, num_steps=0)
    with pytest.raises(ValueError, match=r"noise: expected the shape of x_t, \(5, 3\), got \(3,\)"):
        sample_transition(LAW, x, 0.2, 0.4, num_steps=2, noise=torch.zeros(3))
    with pytest.raises(ValueError, match="times: expected num_steps \\+ 1 = 3 increasing values"):
        sample(LAW, x, num_steps=2, num_transitions=1, times=[0, 1])
    with pytest.raises(ValueError, match="noises: expected one per transition after the first, 1, got 0"):
        sample(LAW, x, num_steps=2, num_transitions=2, noises=[])
