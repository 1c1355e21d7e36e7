"""Noise schedules: the scales (α_t, σ_t) of signal and noise at time t ∈ [0, 1].

A noised sample is x_t = α_t z + σ_t ε, of a clean sample z and standard normal noise ε: noise
at t = 0, data at t = 1. A noise level is (t, α_t, σ_t), and a noise schedule maps t to it. The
signal-to-noise ratio P_t = (α_t/σ_t)² increases in t, so that it has an inverse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class NoiseLevel:
    """A point of a noise schedule: x_t = α_t z + σ_t ε.

    Args:
        t: Time, 0 for noise to 1 for data.
        alpha: α_t, scale of the clean sample.
        sigma: σ_t, scale of the noise.
    """

    t: float
    alpha: float
    sigma: float

    @property
    def snr(self) -> float:
        """P_t = (α_t / σ_t)², the precision of z given x_t; infinite at data."""
        return self.root_snr**2

    @property
    def root_snr(self) -> float:
        """α_t / σ_t."""
        return self.alpha / self.sigma if self.sigma else math.inf


class NoiseSchedule(Protocol):
    """The noise level at each time, and the time of each signal-to-noise ratio; all floats."""

    def level(self, t: float) -> NoiseLevel:
        """Return (α_t, σ_t) at time t."""
        ...

    def time(self, snr: float) -> float:
        """Return the time t of signal-to-noise ratio P_t = `snr`, the inverse of `level(t).snr`."""
        ...


@dataclass(frozen=True)
class RectifiedFlow:
    """The straight path x_t = t z + (1 − t) c ε of rectified flows (FLUX, SD3, Wan …).

    Args:
        noise_scale: c, standard deviation of the initial noise; 1 except for PRX-Pixel.
    """

    noise_scale: float = 1.0

    def level(self, t: float) -> NoiseLevel:
        return NoiseLevel(t, t, self.noise_scale * (1.0 - t))

    def time(self, snr: float) -> float:
        return 1.0 / (1.0 + snr**-0.5 / self.noise_scale) if snr else 0.0


@dataclass(frozen=True)
class Trigonometric:
    """The path x_t = sin(πt/2) z + cos(πt/2) ε.

    Models that are told a continuous noise level (SVD, EDM) follow it.
    """

    def level(self, t: float) -> NoiseLevel:
        # exact at both ends
        return NoiseLevel(t, math.sin(math.pi / 2 * t), math.sin(math.pi / 2 * (1 - t)))

    def time(self, snr: float) -> float:
        return math.atan(math.sqrt(snr)) * 2 / math.pi


class VariancePreserving:
    """A discrete table α_t² = ᾱ_n, σ_t² = 1 − ᾱ_n (SD, SDXL, DiT …) in continuous time.

    Entry n of T lies at t = 1 − (n + 1)/T. The last entry, noise or nearly so, is at t = 0, and
    clean data follow the first entry at t = 1. Between entries the angle φ = atan2(σ, α) is
    linear in t. This angle is finite for every signal-to-noise ratio, from clean data (φ = 0) to a
    zero terminal SNR (φ = π/2).

    Args:
        alphas_cumprod: ᾱ_0 > ᾱ_1 > … > ᾱ_{T−1}, shape (T,), in [0, 1).

    Raises:
        ValueError: if the table does not decrease within [0, 1).
    """

    def __init__(self, alphas_cumprod: Sequence[float]) -> None:
        table = np.asarray(alphas_cumprod, np.float64)
        if table.ndim != 1 or not _decreases_from_one_to_zero(table):
            ends = f" from {table.flat[0]:.6g} to {table.flat[-1]:.6g}" if table.size else ""
            raise ValueError(
                "alphas_cumprod: expected a one-dimensional table that decreases strictly "
                f"within [0, 1), got shape {table.shape}{ends}: pass `scheduler.alphas_cumprod` "
                "of the model's own scheduler"
            )
        self._times = np.linspace(0.0, 1.0, len(table) + 1)
        self._angles = np.append(np.arctan2(np.sqrt(1 - table), np.sqrt(table))[::-1], 0.0)

    def level(self, t: float) -> NoiseLevel:
        angle = float(np.interp(t, self._times, self._angles))
        return NoiseLevel(t, math.sin(math.pi / 2 - angle), math.sin(angle))  # exact at both ends

    def time(self, snr: float) -> float:
        angle = math.atan2(1.0, math.sqrt(snr))
        return float(np.interp(-angle, -self._angles, self._times))


def _decreases_from_one_to_zero(table: np.ndarray) -> bool:
    """Return whether 1 > ᾱ_0 > ᾱ_1 > … ≥ 0, which no NaN fulfils."""
    return bool(table.size and table[0] < 1 and np.all(np.diff(table) < 0) and table[-1] >= 0)


@dataclass(frozen=True)
class VarianceExploding:
    """The variance-exploding path x_t = z + σ_t ε of EDM models, with σ_t from σ_max to 0.

        σ_t = σ_data tan(φ_max (1 − t)),     φ_max = atan(σ_max/σ_data)

    Even steps of t are even steps of the angle atan(σ/σ_data). An EDM network D(x; σ) is the
    denoiser `lambda x, t: network(x, schedule.level(t).sigma)`. Chains start from σ_max · ε.

    Args:
        sigma_max: Noise level at t = 0.
        sigma_data: Standard deviation of the data, where steps are finest.

    Raises:
        ValueError: if `sigma_max` or `sigma_data` is not positive.
    """

    sigma_max: float = 80.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not (self.sigma_max > 0 and self.sigma_data > 0):
            raise ValueError(
                f"sigma_max, sigma_data: expected positive, got {self.sigma_max}, {self.sigma_data}"
            )

    def level(self, t: float) -> NoiseLevel:
        return NoiseLevel(t, 1.0, self.sigma_data * math.tan((1 - t) * self._angle_max))

    def time(self, snr: float) -> float:
        return 1 - math.atan2(1.0, self.sigma_data * math.sqrt(snr)) / self._angle_max

    @property
    def _angle_max(self) -> float:
        return math.atan2(self.sigma_max, self.sigma_data)
