from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from glassflows import VariancePreserving, renewal, sample, sample_posterior, sample_transition, value
from glassflows.flow.transition import ddpm_correlation
from oracles import Gaussian, GaussianMixture, reference, wrong
from schedules import SCHEDULES

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


def transition_pvalue(law, rho, t_next, *, judge=None):
    """KS test of transitions from one x_t against the exact law of x_t′ given x_t, as `judge` has it."""
    x_t = torch.tensor([[0.2, 0.7, -0.3]], dtype=torch.float64)
    x_t = x_t * 2 * law.schedule.level(0.4).sigma  # noise of the size of the schedule's own
    drawn = sample_transition(
        law, x_t.expand(20_000, -1), 0.4, t_next,
        num_steps=60, correlation=rho, generator=torch.Generator().manual_seed(0), schedule=law.schedule,
    )  # fmt: skip
    value = ddpm_correlation(law.schedule.level(0.4), law.schedule.level(t_next)) if rho == "ddpm" else rho
    cdf = (judge or law).transition(x_t, 0.4, t_next, value).cdf(DIRECTION)
    return kstest((drawn @ DIRECTION).numpy(), cdf).pvalue


def on(schedule, kind=GaussianMixture):
    return kind(LAW.means, LAW.weights, LAW.std, schedule)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("rho", [0.0, 0.4, "ddpm", 0.9, -0.3])
def test_law_of_transition(name, rho):
    assert transition_pvalue(on(SCHEDULES[name]), rho, 0.7) > ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("rho", [0.0, 0.4, "ddpm", 0.9, -0.3])
def test_law_of_posterior(name, rho):
    """At data every ρ is the same transition, the posterior."""
    assert transition_pvalue(on(SCHEDULES[name]), rho, 1.0) > ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("kind", [wrong.SquaredCorrelation, wrong.DroppedWeights, wrong.NextNoise])
def test_law_of_transition_rejects_wrong_ones(kind):
    assert transition_pvalue(LAW, 0.4, 0.7, judge=on(LAW.schedule, kind)) < ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("kind", [wrong.DroppedWeights, wrong.NextNoise])
def test_law_of_posterior_rejects_wrong_ones(kind):
    assert transition_pvalue(LAW, "ddpm", 1.0, judge=on(LAW.schedule, kind)) < ALPHA


@pytest.mark.parametrize("rho", [0.4, "ddpm"])
def test_transition_of_a_gaussian(rho):
    """Mean and covariance given x_t, for a covariance that is not isotropic, within 5 standard errors."""
    spread = torch.tensor([[1.0, 0.6, 0.2], [0.6, 0.8, -0.1], [0.2, -0.1, 0.5]], dtype=torch.float64)
    law = Gaussian(torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64), spread)
    x_t = torch.tensor([[0.2, 0.7, -0.3]], dtype=torch.float64)
    drawn = sample_transition(
        law, x_t.expand(40_000, -1), 0.4, 0.7,
        num_steps=60, correlation=rho, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    value = ddpm_correlation(law.schedule.level(0.4), law.schedule.level(0.7)) if rho == "ddpm" else rho
    mean, covariance = law.transition(x_t, 0.4, 0.7, value)
    scale = covariance.diagonal().sqrt()
    assert ((drawn.mean(0) - mean[0]).abs() / scale * 200).max() < 5
    assert ((drawn.T.cov() - covariance).abs() / scale.outer(scale) * 200).max() < 5 * 2**0.5


@pytest.mark.slow
def test_law_rejects_euler_with_few_steps():
    """The test of law is sharp enough to see the error of a coarse solver."""
    x_t = torch.tensor([[0.2, 0.7, -0.3]], dtype=torch.float64).expand(20_000, -1)
    drawn = sample_transition(
        LAW, x_t, 0.4, 1.0, num_steps=3, solver_order=1, generator=torch.Generator().manual_seed(0)
    )
    cdf = LAW.posterior(x_t[:1], 0.4).cdf(DIRECTION)
    assert kstest((drawn @ DIRECTION).numpy(), cdf).pvalue < ALPHA


def chain_pvalue(law, num_transitions, rho="ddpm"):
    generator = torch.Generator().manual_seed(1)
    x = law.schedule.level(0.0).sigma * torch.randn(10_000, 3, generator=generator, dtype=torch.float64)
    drawn = sample(
        law, x,
        num_steps=96, num_transitions=num_transitions, correlation=rho, generator=generator, schedule=law.schedule,
    )  # fmt: skip
    true = law.sample(10_000, generator)
    return kstest((drawn @ DIRECTION).numpy(), (true @ DIRECTION).numpy()).pvalue


@pytest.mark.slow
@pytest.mark.parametrize("num_transitions", [1, 2, 3, 5, 8, 12])
@pytest.mark.parametrize("rho", ["ddpm", 0.1])
def test_chains_preserve_the_data_law(num_transitions, rho):
    assert chain_pvalue(LAW, num_transitions, rho) > ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_chains_preserve_the_data_law_on_every_schedule(name):
    assert chain_pvalue(on(SCHEDULES[name]), 6) > ALPHA


@pytest.mark.slow
def test_chains_with_a_wrong_denoiser_do_not():
    assert chain_pvalue(on(LAW.schedule, wrong.DroppedWeights), 6) < ALPHA


@pytest.mark.slow
@pytest.mark.parametrize(
    "rho",
    [["ddpm", 0.4, -0.3, 0.9, "ddpm", 0.0], lambda t, t_next: t * (1 - t_next), renewal(0.5)],
    ids=["list", "function", "renewal"],
)
def test_chains_preserve_the_data_law_for_lists_and_functions(rho):
    assert chain_pvalue(LAW, 6, rho) > ALPHA


def test_lists_and_functions_give_each_transition_its_own_correlation():
    """Three transitions of one call from replayed noise, against single transitions."""
    x, *noises = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = [0.0, 0.3, 0.6, 0.9]
    rhos = [1.0, -0.2, 0.7]  # the first is not used

    def run(correlation):
        return sample(LAW, x, num_steps=3, num_transitions=3, times=times, correlation=correlation, noises=noises)

    expected = sample(LAW, x, num_steps=1, num_transitions=1, times=times[:2])
    for k in (1, 2):
        expected = sample_transition(
            LAW, expected, times[k], times[k + 1], num_steps=1, correlation=rhos[k], noise=noises[k - 1]
        )
    torch.testing.assert_close(run(rhos), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(run(lambda t, t_next: rhos[times.index(t)]), expected, rtol=0, atol=1e-12)
    assert (run("ddpm") - expected).abs().min() > 1e-3
    with pytest.raises(ValueError, match="^correlation: expected one per transition, 3, got a list of 2"):
        run([0.1, 0.2])
    with pytest.raises(ValueError, match=r'^correlation: expected "ddpm" or a number in \[-1, 1\], got 1\.5$'):
        run(lambda t, t_next: 1.5)


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


@pytest.mark.slow
@pytest.mark.parametrize("rho", [1.0, -1.0])
def test_deterministic_given_z(rho):
    """ρ = ±1: x_t′ = γ̄ x_t + ᾱ z with z from the posterior, and no noise of its own."""
    x_t = torch.tensor([[0.2, 0.7, -0.3]], dtype=torch.float64).expand(20_000, -1)
    drawn = sample_transition(
        LAW, x_t, 0.4, 0.7, num_steps=60, correlation=rho, generator=torch.Generator().manual_seed(0)
    )
    cdf = LAW.transition(x_t[:1], 0.4, 0.7, rho).cdf(DIRECTION)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_value_is_that_of_the_exact_posterior(name):
    """log E[exp(a·z) | x_t] in closed form, within 5 standard errors of its estimate from 4000 samples."""
    law = on(SCHEDULES[name])
    x = law.schedule.level(0.5).sigma * torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    exact = law.value(x, 0.5, DIRECTION)
    spread = (law.value(x, 0.5, 2 * DIRECTION) - 2 * exact).exp() - 1  # relative variance of exp(a·z)

    def off(truth):
        estimate = value(
            law, x, 0.5, lambda z: z @ DIRECTION,
            num_samples=4000, num_steps=24, schedule=law.schedule, generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        return ((estimate - truth).abs() / (spread / 4000).sqrt()).max()

    assert off(exact) < 5
    assert off(on(SCHEDULES[name], wrong.DroppedWeights).value(x, 0.5, DIRECTION)) > 5


def test_a_value_of_one_sample_is_its_reward():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = sample_posterior(LAW, x, 0.4, num_steps=6, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    got = value(LAW, x, 0.4, lambda z: z @ DIRECTION, num_samples=1, num_steps=6, generator=generator)
    torch.testing.assert_close(got, z @ DIRECTION, rtol=0, atol=1e-12)
    with pytest.raises(
        ValueError, match=r"^reward returned shape \(10, 1\); expected one score per sample, shape \(10"
    ):
        value(LAW, x, 0.4, lambda z: z[:, :1], num_samples=2, num_steps=1)
    with pytest.raises(ValueError, match="num_samples: expected at least 1, got 0"):
        value(LAW, x, 0.4, lambda z: z[:, 0], num_samples=0, num_steps=1)


def test_bad_input():
    x = torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"^t, t_next: expected 0 ≤ t < t_next ≤ 1 .*, got t=0\.6, t_next=0\.4$"):
        sample_transition(LAW, x, 0.6, 0.4, num_steps=2)
    with pytest.raises(ValueError, match="^num_steps: expected at least 1 network call, got 0$"):
        sample_transition(LAW, x, 0.2, 0.4, num_steps=0)
    with pytest.raises(ValueError, match=r"noise: expected the shape of x_t, \(5, 3\), got \(3,\)"):
        sample_transition(LAW, x, 0.2, 0.4, num_steps=2, noise=torch.zeros(3))
    with pytest.raises(ValueError, match=r"^times: expected num_steps \+ 1 = 3 increasing values in \[0, 1\] .*, got"):
        sample(LAW, x, num_steps=2, num_transitions=1, times=[0, 1])
    with pytest.raises(ValueError, match="noises: expected one per transition after the first, 1, got 0"):
        sample(LAW, x, num_steps=2, num_transitions=2, noises=[])


@pytest.mark.parametrize("shape", [(3,), (1, 3), (5, 1), (4, 3)])
def test_noises_are_one_per_row(shape):
    """They would broadcast, and the rows share them."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"noises: expected the shape of x_init, \(5, 3\), for each, got"):
        sample(lambda x, t: 0.3 * x, x, num_steps=6, num_transitions=2, noises=[torch.randn(shape)])
