"""The oracles themselves, by simulation of their definitions; wrong variants must fail where the true one passes."""

import math

import pytest
import torch
from scipy.stats import chi2, kstest, norm

from oracles import Gaussian, GaussianMixture, joint, reference, wrong
from schedules import SCHEDULES

ALPHA = 1e-5
LAW, _ = reference()
DIRECTION = torch.tensor([0.6, -0.5, 0.3], dtype=torch.float64)
TIMES = (0.35, 0.6)
GAUSSIAN = Gaussian(
    torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64),
    torch.tensor([[1.0, 0.6, 0.2], [0.6, 0.8, -0.1], [0.2, -0.1, 0.5]], dtype=torch.float64),
)


def seeded():
    return torch.Generator().manual_seed(0)


def as_mixture(kind, schedule=LAW.schedule):
    return kind(LAW.means, LAW.weights, LAW.std, schedule)


def upper_half(x_t, *others):
    """Keep the rows of one half of the x_t: over all of them, the prior's own weights are right on average."""
    kept = x_t @ DIRECTION > (x_t @ DIRECTION).median()
    return [one[kept] for one in (x_t, *others)]


def transition_pvalue(law, rho=0.4):
    """Under the true conditional law F(x_t′ | x_t) is uniform, over any set of x_t."""
    _, x_t, x_next = joint(law, 40_000, *TIMES, rho, seeded())
    x_t, x_next = upper_half(x_t, x_next)
    cdf = law.transition(x_t, *TIMES, rho).cdf(DIRECTION)
    return kstest(cdf((x_next @ DIRECTION).numpy()), "uniform").pvalue


def posterior_pvalue(law):
    z, x_t, _ = joint(law, 40_000, *TIMES, 0.0, seeded())
    x_t, z = upper_half(x_t, z)
    return kstest(law.posterior(x_t, TIMES[0]).cdf(DIRECTION)((z @ DIRECTION).numpy()), "uniform").pvalue


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("rho", [-1.0, -0.3, 0.0, 0.4, 0.9, 1.0])
def test_transition_of_a_mixture(name, rho):
    assert transition_pvalue(as_mixture(GaussianMixture, SCHEDULES[name]), rho) > ALPHA


@pytest.mark.parametrize("kind", [wrong.SquaredCorrelation, wrong.DroppedWeights, wrong.NextNoise])
def test_wrong_transitions_are_rejected(kind):
    assert transition_pvalue(as_mixture(kind)) < ALPHA


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_of_a_mixture(name):
    assert posterior_pvalue(as_mixture(GaussianMixture, SCHEDULES[name])) > ALPHA


@pytest.mark.parametrize("kind", [wrong.DroppedWeights, wrong.NextNoise])
def test_wrong_posteriors_are_rejected(kind):
    assert posterior_pvalue(as_mixture(kind)) < ALPHA


def gaussian_pvalue(law, rho=0.4):
    _, x_t, x_next = joint(law, 20_000, *TIMES, rho, seeded())
    mean, covariance = law.transition(x_t, *TIMES, rho)
    scaled = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (x_next - mean).T, upper=False)
    return kstest(scaled.square().sum(0).numpy(), chi2(3).cdf).pvalue


def test_transition_of_a_gaussian():
    assert gaussian_pvalue(GAUSSIAN) > ALPHA
    assert gaussian_pvalue(wrong.SquaredCorrelationGaussian(GAUSSIAN.mean, GAUSSIAN.covariance)) < ALPHA


def test_gaussian_and_mixture_of_one_agree():
    mixture = GaussianMixture(GAUSSIAN.mean[None], torch.ones(1, dtype=torch.float64), 0.7)
    gaussian = Gaussian(GAUSSIAN.mean, 0.49 * torch.eye(3, dtype=torch.float64))
    x = torch.randn(5, 3, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(mixture(x, 0.4), gaussian(x, 0.4), rtol=0, atol=1e-12)
    law, (mean, covariance) = mixture.transition(x, *TIMES, 0.4), gaussian.transition(x, *TIMES, 0.4)
    torch.testing.assert_close(law.means[:, 0], mean, rtol=0, atol=1e-12)
    assert law.variance == pytest.approx(covariance[0, 0].item(), abs=1e-12)


def deviations(samples, expected):
    """How many standard errors the mean of samples is off."""
    return abs(samples.mean().item() - expected) / (samples.std().item() / math.sqrt(len(samples)))


def test_evidence_and_tilt():
    z = LAW.sample(200_000, seeded())
    weights = (z @ DIRECTION).exp()
    assert deviations(weights, math.exp(LAW.log_evidence(DIRECTION))) < norm.isf(ALPHA)
    mistaken = as_mixture(wrong.UntiltedWeights)
    assert deviations(weights, math.exp(mistaken.log_evidence(DIRECTION))) > norm.isf(ALPHA)
    for law, accepted in ((LAW, True), (mistaken, False)):  # E_tilted[f] Z = E[f exp(a·z)]
        tilted = law.tilted(DIRECTION)
        mean = (tilted.weights @ tilted.means @ DIRECTION).item()
        residual = weights * (z @ DIRECTION - mean)
        assert (deviations(residual, 0.0) < norm.isf(ALPHA)) == accepted


def test_value_is_the_evidence_of_the_posterior():
    """E[exp V_t(x_t)] = E[exp(a·z)]: the value function is a martingale on the natural scale."""
    _, x_t, _ = joint(LAW, 200_000, *TIMES, 0.0, seeded())
    expected = math.exp(LAW.log_evidence(DIRECTION))
    assert deviations(LAW.value(x_t, TIMES[0], DIRECTION).exp(), expected) < norm.isf(ALPHA)
    mistaken = as_mixture(wrong.DroppedWeights).value(x_t, TIMES[0], DIRECTION).exp()
    assert deviations(mistaken, expected) > norm.isf(ALPHA)
