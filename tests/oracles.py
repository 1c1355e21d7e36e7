"""Laws with closed forms: what the samplers must reproduce. `wrong` holds variants that the tests must reject."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from glassflows.flow.noise import NoiseLevel, NoiseSchedule, RectifiedFlow


class Law(NamedTuple):
    """Per row a mixture of isotropic Gaussians: weights (N, k), means (N, k, d), one variance."""

    weights: Tensor
    means: Tensor
    variance: float

    def cdf(self, direction: Tensor):
        """Return the distribution function of direction · y, row by row, or of one row at many values."""
        centres = (self.means @ direction).numpy()
        scale = math.sqrt(self.variance * direction.square().sum().item())
        return lambda value: (self.weights.numpy() * norm.cdf((np.asarray(value)[:, None] - centres) / scale)).sum(-1)

    def log_mean_exp(self, direction: Tensor) -> Tensor:
        """Return log E[exp(direction · y)] of each row, shape (N,)."""
        exponents = self.means @ direction + self.variance * direction.square().sum() / 2
        return (self.weights.log() + exponents).logsumexp(-1)


@dataclass(frozen=True)
class Gaussian:
    """z ~ N(mean, covariance), any covariance: the denoiser and the transition by matrix algebra alone."""

    mean: Tensor
    covariance: Tensor
    schedule: NoiseSchedule = RectifiedFlow()  # noqa: RUF009 (frozen)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """The denoiser E[z | x_t = x]."""
        return self.posterior(x, t)[0]

    def posterior(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Return mean (N, d) and covariance (d, d) of p(z | x_t = x)."""
        level = self.schedule.level(t)
        marginal = level.alpha**2 * self.covariance + level.sigma**2 * torch.eye(len(self.mean), dtype=x.dtype)
        gain = level.alpha * torch.linalg.solve(marginal, self.covariance).T
        return (
            self.mean + (x - level.alpha * self.mean) @ gain.T,
            self.covariance - level.alpha * gain @ self.covariance,
        )

    def transition(self, x: Tensor, t: float, t_next: float, rho: float) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of p(x_t′ | x_t = x), by conditioning the joint Gaussian of (x_t, x_t′)."""
        now, then = self.schedule.level(t), self.schedule.level(t_next)
        eye = torch.eye(len(self.mean), dtype=x.dtype)
        own, cross, other = (
            a.alpha * b.alpha * self.covariance + correlation * a.sigma * b.sigma * eye
            for a, b, correlation in ((now, now, 1.0), (now, then, rho), (then, then, 1.0))
        )
        gain = torch.linalg.solve(own, cross).T
        return then.alpha * self.mean + (x - now.alpha * self.mean) @ gain.T, other - gain @ cross

    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(number, len(self.mean), generator=generator, dtype=torch.float64)
        return self.mean + noise @ torch.linalg.cholesky(self.covariance).T


@dataclass(frozen=True)
class GaussianMixture:
    """z ~ Σ_k w_k N(m_k, std² I), seen through a noise schedule."""

    means: Tensor
    weights: Tensor
    std: float
    schedule: NoiseSchedule = RectifiedFlow()  # noqa: RUF009 (frozen)

    def posterior(self, x: Tensor, t: float) -> Law:
        """Return p(z | x_t = x)."""
        level = self.schedule.level(t)
        alpha, sigma = level.alpha, level.sigma
        total = (alpha * self.std) ** 2 + sigma**2
        residual = x[:, None] - alpha * self.means
        log_weights = self.weights.log() - residual.square().sum(-1) / (2 * total)
        means = self.means + alpha * self.std**2 / total * residual
        return Law(log_weights.softmax(-1), means, (self.std * sigma) ** 2 / total)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """The denoiser E[z | x_t = x]."""
        law = self.posterior(x, t)
        return (law.weights[..., None] * law.means).sum(1)

    def transition(self, x: Tensor, t: float, t_next: float, rho: float) -> Law:
        """Return p(x_t′ | x_t = x), from the definition: x_t′ = γ̄ x_t + ᾱ z + σ̄ ε̄ with z from the posterior."""
        now, then = self.schedule.level(t), self.schedule.level(t_next)
        gamma = rho * then.sigma / now.sigma
        alpha = then.alpha - gamma * now.alpha
        law = self.posterior(x, t)
        variance = alpha**2 * law.variance + then.sigma**2 * (1 - rho**2)
        return Law(law.weights, gamma * x[:, None] + alpha * law.means, variance)

    def tilted(self, direction: Tensor) -> GaussianMixture:
        """Return the law p(z) exp(direction · z) / Z, a mixture again."""
        log_weights = self.weights.log() + self.means @ direction
        return replace(self, means=self.means + self.std**2 * direction, weights=log_weights.softmax(-1))

    def log_evidence(self, direction: Tensor) -> float:
        """Return log E[exp(direction · z)]."""
        return Law(self.weights[None], self.means[None], self.std**2).log_mean_exp(direction).item()

    def value(self, x: Tensor, t: float, direction: Tensor) -> Tensor:
        """Return V_t(x) = log E[exp(direction · z) | x_t = x], shape (N,)."""
        return self.posterior(x, t).log_mean_exp(direction)

    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        rows = torch.multinomial(self.weights, number, replacement=True, generator=generator)
        noise = torch.randn(number, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[rows] + self.std * noise


def joint(law, number: int, t: float, t_next: float, rho: float, generator: torch.Generator):
    """Draw (z, x_t, x_t′) by definition: noises of correlation ρ on one z."""
    z = law.sample(number, generator)
    first, second = torch.randn(2, *z.shape, generator=generator, dtype=z.dtype)
    now, then = law.schedule.level(t), law.schedule.level(t_next)
    noise = rho * first + math.sqrt(1 - rho**2) * second
    return z, now.alpha * z + now.sigma * first, then.alpha * z + then.sigma * noise


class wrong:
    """Deliberately wrong oracles; each must be told from the truth."""

    @dataclass(frozen=True)
    class DroppedWeights(GaussianMixture):
        """The posterior forgets how likely each component made x_t."""

        def posterior(self, x: Tensor, t: float) -> Law:
            law = super().posterior(x, t)
            return law._replace(weights=self.weights.expand_as(law.weights))

    @dataclass(frozen=True)
    class SquaredCorrelation(GaussianMixture):
        """The transition of ρ² for that of ρ."""

        def transition(self, x: Tensor, t: float, t_next: float, rho: float) -> Law:
            return super().transition(x, t, t_next, rho**2)

    @dataclass(frozen=True)
    class NextNoise(GaussianMixture):
        """The posterior takes σ_t for that of a later time."""

        def posterior(self, x: Tensor, t: float) -> Law:
            level, later = self.schedule.level(t), self.schedule.level(0.8 * t + 0.2)
            mixed = _Fixed(NoiseLevel(t, level.alpha, later.sigma))
            return GaussianMixture(self.means, self.weights, self.std, mixed).posterior(x, t)

    @dataclass(frozen=True)
    class UntiltedWeights(GaussianMixture):
        """The tilt moves the components but not their weights; the evidence forgets their variance."""

        def tilted(self, direction: Tensor) -> GaussianMixture:
            return replace(super().tilted(direction), weights=self.weights)

        def log_evidence(self, direction: Tensor) -> float:
            return (self.weights.log() + self.means @ direction).logsumexp(-1).item()

    @dataclass(frozen=True)
    class SquaredCorrelationGaussian(Gaussian):
        """The Gaussian transition of ρ² for that of ρ."""

        def transition(self, x: Tensor, t: float, t_next: float, rho: float) -> tuple[Tensor, Tensor]:
            return super().transition(x, t, t_next, rho**2)


@dataclass(frozen=True)
class _Fixed:
    """A schedule of one level."""

    at: NoiseLevel

    def level(self, t: float) -> NoiseLevel:
        return self.at

    def time(self, snr: float) -> float:
        return self.at.t


def reference() -> tuple[GaussianMixture, list[dict]]:
    """The mixture and the eight transitions of the authors' published implementation, float64."""
    data = json.loads((Path(__file__).parent / "reference" / "transitions.json").read_text())
    law = data["mixture"]
    cases = [
        {
            key: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
            for key, value in case.items()
        }
        for case in data["cases"]
    ]
    means, weights = (torch.tensor(law[key], dtype=torch.float64) for key in ("means", "weights"))
    return GaussianMixture(means, weights, law["std"]), cases


def statistic_by_solve(
    x_t: Tensor, x_bar: Tensor, *, alpha: float, sigma: float, alpha_bar: float, sigma_bar: float, rho: float
):
    """Condition z on two correlated measurements by a 2×2 solve: x_t = α z + σ ε and x̄ = ᾱ z + σ̄ ε̄, corr(ε, ε̄) = ρ.

    Returns the sufficient statistic (the measurement of z of unit weight) and its precision.
    """
    covariance = np.array([[sigma**2, rho * sigma * sigma_bar], [rho * sigma * sigma_bar, sigma_bar**2]])
    loading = np.array([alpha, alpha_bar])
    gain = np.linalg.solve(covariance, loading)
    precision = float(gain @ loading)
    return (gain[0] * x_t + gain[1] * x_bar) / precision, precision


def mixture(dimensions: int, components: int, std: float, seed: int) -> GaussianMixture:
    """A mixture of random means: what the orders are measured on, and nothing the solver was tuned to."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(components, dimensions, generator=generator, dtype=torch.float64)
    return GaussianMixture(means, torch.full((components,), 1 / components, dtype=torch.float64), std)


def gaussian(x: Tensor, t: float, noise: float = 1.0) -> Tensor:
    """E[z | x_t] of z ~ N(0, 1) and x_t = t z + noise (1 − t) ε."""
    return t * x / (t**2 + noise**2 * (1 - t) ** 2)
