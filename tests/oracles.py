"""Laws with closed forms: what the samplers must reproduce."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from glassflows.flow.noise import NoiseLevel, NoiseSchedule, RectifiedFlow


@dataclass(frozen=True)
class GaussianMixture:
    """z ~ Σ_k w_k N(m_k, std² I), seen through a noise schedule."""

    means: Tensor
    weights: Tensor
    std: float
    schedule: NoiseSchedule = RectifiedFlow()  # noqa: RUF009 (frozen)

    def posterior(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor, float]:
        """Return p(z | x_t = x) as (weights (N, k), means (N, k, d), variance)."""
        alpha, sigma = level.alpha, level.sigma
        total = (alpha * self.std) ** 2 + sigma**2
        residual = x[:, None] - alpha * self.means
        log_weights = self.weights.log() - residual.square().sum(-1) / (2 * total)
        means = self.means + alpha * self.std**2 / total * residual
        return log_weights.softmax(-1), means, (self.std * sigma) ** 2 / total

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """The denoiser E[z | x_t = x]."""
        weights, means, _ = self.posterior(x, self.schedule.level(t))
        return (weights[..., None] * means).sum(1)

    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        rows = torch.multinomial(self.weights, number, replacement=True, generator=generator)
        noise = torch.randn(number, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[rows] + self.std * noise

    def transition_cdf(self, x: Tensor, t: float, t_next: float, rho: float, direction: Tensor):
        """Return the distribution function of direction · x_t′ given one x_t, shape (1, d), from the definition."""
        now, then = self.schedule.level(t), self.schedule.level(t_next)
        gamma = rho * then.sigma / now.sigma
        alpha = then.alpha - gamma * now.alpha
        weights, means, variance = self.posterior(x, now)
        centres = ((gamma * x[:, None] + alpha * means) @ direction)[0].numpy()
        scale = math.sqrt((alpha**2 * variance + then.sigma**2 * (1 - rho**2)) * direction.square().sum().item())
        return lambda value: (weights[0].numpy() * norm.cdf((np.asarray(value)[:, None] - centres) / scale)).sum(-1)


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
