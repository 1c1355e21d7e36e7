"""The four coordinate systems in which native schedulers name noise levels.

A native scheduler has two names for a noise level: its *sigma*, an entry of `scheduler.sigmas`, and
its *timestep*, what the network is told. Coordinates translate both names to the (α, σ) of the
latents' path in this package, and say what the network predicts along it.

    FlowTimes      x = (1 − σ) z + σ ε            timestep T σ
    TableEntries   x = √ᾱ_n z + √(1 − ᾱ_n) ε      timestep n, sigma √(1/ᾱ_n − 1)
    ScaledSigmas   x = (z + σ ε)/√(σ² + σ_data²)  timestep log(σ)/4 or atan(σ) 2/π
    CosmosSigmas   x = z + σ ε                    timestep T σ
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..flow.denoise import Prediction
from ..flow.noise import (
    NoiseLevel,
    NoiseSchedule,
    RectifiedFlow,
    Trigonometric,
    VarianceExploding,
    VariancePreserving,
)
from .supported import NeedsFlowMatchScheduler


@dataclass(frozen=True)
class NativeGrid:
    """The grid a native scheduler chose for N network calls.

    Args:
        levels: N + 1 noise levels, noise first; the native sampler ends at the last level.
        timesteps: What the network is told at each call, shape (N,), on the device asked for.
        sigmas: The native sigmas of the levels, shape (N + 1,), float32.
        end_scale: Ratio of the native sampler's last sample to x at the last level.
    """

    levels: tuple[NoiseLevel, ...]
    timesteps: Tensor
    sigmas: Tensor
    end_scale: float = 1.0


class Reading(NamedTuple):
    """What a network predicts, and whether it predicts the negative."""

    prediction: Prediction
    negated: bool = False


class Coordinates(Protocol):
    """How a native scheduler names noise levels.

    Attributes:
        schedule: The noise schedule of the latents in this package.
        data_scale: Standard deviation of the host's clean samples in units of these latents.
        readings: What each `prediction_type` of a config means; None for a config without that key.
    """

    @property
    def schedule(self) -> NoiseSchedule: ...

    @property
    def data_scale(self) -> float: ...

    @property
    def readings(self) -> Mapping[str | None, Reading]: ...

    def level(self, sigma: float) -> NoiseLevel:
        """Return the noise level of a native sigma."""
        ...

    def level_at(self, timestep: float) -> NoiseLevel:
        """Return the noise level of a native timestep."""
        ...

    def sigma(self, level: NoiseLevel) -> float:
        """Return the native sigma of a noise level, the inverse of `level`."""
        ...

    def timesteps(self, levels: Sequence[NoiseLevel], grid: NativeGrid) -> Tensor:
        """Return the native timesteps of noise levels between those of a grid, float32."""
        ...

    def path(self, level: NoiseLevel) -> NoiseLevel:
        """Return the (α, σ) of the path along which the network's prediction is defined."""
        ...


TABLE_READINGS: dict[str | None, Reading] = {
    "epsilon": Reading("epsilon"),
    "v_prediction": Reading("v_prediction"),
    "sample": Reading("sample"),
}


@dataclass(frozen=True)
class FlowTimes:
    """The times σ of a straight path.

    Args:
        num_train_timesteps: T.
        noise_scale: Standard deviation of the initial noise.
        inverted: Whether sigmas rise, from 0 for noise to 1 for data (`invert_sigmas`).
    """

    num_train_timesteps: int
    noise_scale: float = 1.0
    inverted: bool = False
    data_scale: float = field(default=1.0, init=False)

    @property
    def schedule(self) -> NoiseSchedule:
        return RectifiedFlow(self.noise_scale)

    @property
    def readings(self) -> Mapping[str | None, Reading]:
        velocity = Reading("velocity", negated=self.inverted)
        return {None: velocity, "flow_prediction": velocity}

    def level(self, sigma: float) -> NoiseLevel:
        if not 0 <= sigma <= 1:
            raise NeedsFlowMatchScheduler(
                f"sigmas: expected flow times in [0, 1], got {sigma:.6g}: a pipeline that asks for "
                "FlowMatchEulerDiscreteScheduler by isinstance (Bria) needs GLASSFlowMatchScheduler"
            )
        return self.schedule.level(sigma if self.inverted else 1 - sigma)

    def level_at(self, timestep: float) -> NoiseLevel:
        return self.level(timestep / self.num_train_timesteps)

    def sigma(self, level: NoiseLevel) -> float:
        return level.t if self.inverted else 1 - level.t

    def timesteps(self, levels: Sequence[NoiseLevel], grid: NativeGrid) -> Tensor:
        """Interpolate, because a host may give timesteps that are not T σ (CogView 4)."""
        end = self.num_train_timesteps * (1 - grid.levels[-1].t)
        return _interpolated(levels, grid, self.num_train_timesteps - end if self.inverted else end)

    def path(self, level: NoiseLevel) -> NoiseLevel:
        """Return the path at unit scale, whose dx/dt is the velocity at every noise scale."""
        return NoiseLevel(level.t, level.t, 1 - level.t)


@dataclass(frozen=True)
class TableEntries:
    """The entries n of a table ᾱ_n.

    Args:
        schedule: The table.
        num_train_timesteps: T, its number of entries.
    """

    schedule: VariancePreserving
    num_train_timesteps: int
    data_scale: float = field(default=1.0, init=False)
    readings: Mapping[str | None, Reading] = field(
        default_factory=lambda: TABLE_READINGS, init=False
    )

    def level(self, sigma: float) -> NoiseLevel:
        return _level_of_ratio(self.schedule, sigma)

    def level_at(self, timestep: float) -> NoiseLevel:
        """Return the noise level of an entry; −1 is clean data."""
        return self.schedule.level(max(0.0, 1 - (timestep + 1) / self.num_train_timesteps))

    def sigma(self, level: NoiseLevel) -> float:
        return 1.0 / level.root_snr if level.alpha else math.inf

    def timesteps(self, levels: Sequence[NoiseLevel], grid: NativeGrid) -> Tensor:
        return _interpolated(levels, grid, end=0.0)

    def path(self, level: NoiseLevel) -> NoiseLevel:
        return level


@dataclass(frozen=True)
class ScaledSigmas:
    """The sigmas of x = z + σ ε, for networks that take x/√(σ² + σ_data²).

    These inputs of the networks are the latents in this package.

    Args:
        data_scale: σ_data, standard deviation of the data.
        readings: What a network predicts: v of the scaled data, which EDM names otherwise.
        cosine: Whether the network is told atan(σ) · 2/π rather than log(σ)/4.
    """

    data_scale: float
    readings: Mapping[str | None, Reading]
    cosine: bool = False
    schedule: NoiseSchedule = field(default=Trigonometric(), init=False)

    def level(self, sigma: float) -> NoiseLevel:
        return _level_of_ratio(self.schedule, sigma / self.data_scale)

    def level_at(self, timestep: float) -> NoiseLevel:
        sigma = math.tan(math.pi / 2 * timestep) if self.cosine else math.exp(4 * timestep)
        return self.level(sigma)

    def sigma(self, level: NoiseLevel) -> float:
        return self.data_scale / level.root_snr if level.alpha else math.inf

    def timesteps(self, levels: Sequence[NoiseLevel], grid: NativeGrid) -> Tensor:
        sigmas = torch.tensor([self.sigma(level) for level in levels], dtype=torch.float32)
        told = sigmas.atan() / math.pi * 2 if self.cosine else 0.25 * sigmas.log()
        return told.to(grid.timesteps.device)

    def path(self, level: NoiseLevel) -> NoiseLevel:
        return level


EDM_READINGS: dict[str | None, Reading] = {  # F of EDM is v or −v of the scaled data
    "epsilon": Reading("v_prediction", negated=True),
    "v_prediction": Reading("v_prediction"),
}


@dataclass(frozen=True)
class CosmosSigmas:
    """The sigmas of x = z + σ ε, on which the pipelines of Cosmos 2 run a flow scheduler.

    Args:
        schedule: The path, from σ_max.
        num_train_timesteps: T.
    """

    schedule: VarianceExploding
    num_train_timesteps: int
    data_scale: float = field(default=1.0, init=False)
    readings: Mapping[str | None, Reading] = field(
        default_factory=lambda: {None: Reading("epsilon")}, init=False
    )
    """The prediction ε is a velocity, dx/dσ."""

    def level(self, sigma: float) -> NoiseLevel:
        return NoiseLevel(self.schedule.time(sigma**-2 if sigma else math.inf), 1.0, sigma)

    def level_at(self, timestep: float) -> NoiseLevel:
        return self.level(timestep / self.num_train_timesteps)

    def sigma(self, level: NoiseLevel) -> float:
        return 1.0 / level.root_snr

    def timesteps(self, levels: Sequence[NoiseLevel], grid: NativeGrid) -> Tensor:
        return _interpolated(levels, grid, end=0.0)

    def path(self, level: NoiseLevel) -> NoiseLevel:
        return level


def _level_of_ratio(schedule: NoiseSchedule, ratio: float) -> NoiseLevel:
    """Return the variance-preserving noise level at which σ/α = `ratio`."""
    norm = math.hypot(1.0, ratio)
    return NoiseLevel(schedule.time(ratio**-2 if ratio else math.inf), 1 / norm, ratio / norm)


def _interpolated(levels: Sequence[NoiseLevel], grid: NativeGrid, end: float) -> Tensor:
    """Return timesteps between those of a grid; `end` is the timestep of its last level."""
    known = [*grid.timesteps.cpu().double().tolist(), end]
    values = np.interp([level.t for level in levels], [level.t for level in grid.levels], known)
    return torch.tensor(values, dtype=torch.float32, device=grid.timesteps.device)
