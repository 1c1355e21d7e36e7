"""A native scheduler, read: its grid, the coordinates it names noise levels in, its prediction.

The native object itself lays the grid (shifting, spacing, karras sigmas …); here it is only read.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..flow.denoise import denoised
from ..flow.noise import NoiseLevel, NoiseSchedule, VarianceExploding, VariancePreserving
from .config import is_cosmos2, parameters
from .coordinates import (
    EDM_READINGS,
    TABLE_READINGS,
    Coordinates,
    CosmosSigmas,
    FlowTimes,
    NativeGrid,
    Reading,
    ScaledSigmas,
    TableEntries,
)
from .supported import (
    CALLED_TWICE,
    CLIPPED,
    COSINE_DPM,
    EDM,
    EXPLODING,
    FLOW,
    NEARLY_ZERO,
    PNDM,
    TABLE,
    NeedsFlowMatchScheduler,
    UnsupportedScheduler,
    check_class,
)


class Native:
    """A native scheduler, read as grid, coordinates and prediction.

    Args:
        scheduler: The native object; it is used, not copied.
        noise_scale: Standard deviation of the noise, where it is a flow.

    Attributes:
        coordinates: How it names noise levels.
        num_train_timesteps: Length of the list the model was trained on.

    Raises:
        ValueError: if its class, its prediction type or another setting is not supported.
    """

    def __init__(self, scheduler: Any, noise_scale: float = 1.0) -> None:
        self.scheduler = scheduler
        self.name = check_class(type(scheduler).__name__)
        known = parameters(self.name)  # other keys are what an earlier class left behind
        self.config = {key: value for key, value in scheduler.config.items() if key in known}
        self.num_train_timesteps: int = self.config["num_train_timesteps"]
        if (stages := self.config.get("stages", 1)) > 1:
            raise UnsupportedScheduler(
                f"stages: expected 1, got {stages}: a pyramid changes its resolution as it goes"
            )
        self.coordinates = _coordinates(scheduler, self.config, noise_scale)
        is_flow = isinstance(self.coordinates, FlowTimes)
        if not noise_scale > 0 or (noise_scale != 1 and not is_flow):
            raise ValueError(
                f"noise_scale: expected a positive number, 1 where it is no flow, got {noise_scale}"
            )
        self._reading = self._read()
        self._clip = self._clipping()

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the latents."""
        return self.coordinates.schedule

    @property
    def data_scale(self) -> float:
        """Standard deviation of the host's clean samples in units of the latents."""
        return self.coordinates.data_scale

    def _read(self) -> Reading:
        kind = None if self.name in FLOW else self.config["prediction_type"]
        readings = self.coordinates.readings
        if kind not in readings:
            expected = tuple(one for one in readings if one is not None)
            raise UnsupportedScheduler(
                f"prediction_type: expected one of {expected} for {self.name}, got {kind!r}"
            )
        return readings[kind]

    def _clipping(self) -> float | None:
        """Return the bound that ẑ is clipped to, as the native config asks."""
        clips = self.config.get("clip_sample") and self.name in CLIPPED
        return self.config["clip_sample_range"] if clips else None

    # ---- the grid --------------------------------------------------------------------------------

    def grid(self, num_inference_steps: int | None, device: Any, **given: Any) -> NativeGrid:
        """Let the native scheduler lay its grid, with whatever the host gave it.

        Of the lists of PNDM and Heun the entries that they repeat are dropped: one network call for
        each. A `mu` that no dynamic shifting asks for is ignored.

        Args:
            num_inference_steps: Number of network calls, where the host names it.
            device: Device of the timesteps.
            given: `sigmas`, `mu` and `timesteps`, None where the host gave none.

        Raises:
            ValueError: if the native scheduler does not take what the host gave, its noise is not
                finite or does not decrease, or the network is to predict ε where nothing else is.
        """
        self.scheduler.set_timesteps(device=device, **self._accepted(num_inference_steps, given))
        grid = self._table_grid() if self.name in TABLE else self._sigma_grid()
        _check_decreasing(grid)
        if self._reading.prediction == "epsilon" and grid.levels[0].alpha == 0:
            raise ValueError(
                "set_timesteps: expected some signal at each call of a network that predicts ε "
                f"(prediction_type 'epsilon'), got none at timestep {grid.timesteps[0].item():g}, "
                "where ẑ would be 0/0 (zero terminal SNR): a model trained at it has "
                "prediction_type='v_prediction'; with any other set rescale_betas_zero_snr=False, "
                "or timestep_spacing='leading', which leaves this timestep out"
            )
        return grid

    def _accepted(
        self, num_inference_steps: int | None, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments for the native `set_timesteps`."""
        given = dict(given)
        if not self.config.get("use_dynamic_shifting"):
            given["mu"] = None  # FLUX's pipeline, among others, always sends one
        elif given.get("mu") is None:
            raise NeedsFlowMatchScheduler(
                "set_timesteps: expected mu, which use_dynamic_shifting needs, got none: a "
                "pipeline that sends it to a FlowMatchEulerDiscreteScheduler only (Bria, "
                "EasyAnimate) needs GLASSFlowMatchScheduler"
            )
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps: expected at least 1, got {num_inference_steps}")
        given = {key: value for key, value in given.items() if value is not None}
        takes = inspect.signature(self.scheduler.set_timesteps).parameters
        if refused := [key for key in given if key not in takes]:
            raise ValueError(
                f"set_timesteps: {self.name} takes no {', '.join(refused)}: leave them out, or, "
                "where the pipeline sends them itself, give it a scheduler that takes them "
                "(FlowMatchEulerDiscreteScheduler for FLUX and its kin), natively too"
            )
        if num_inference_steps is not None:
            given["num_inference_steps"] = num_inference_steps
        return given

    def _sigma_grid(self) -> NativeGrid:
        sigmas = self.scheduler.sigmas.detach().float().cpu()
        timesteps = self.scheduler.timesteps
        if self.name in CALLED_TWICE:
            sigmas = torch.cat([sigmas[:1], sigmas[1::2]])
            timesteps = torch.cat([timesteps[:1], timesteps[1::2]])
        _check_finite("sigmas", sigmas)
        _check_finite("timesteps", timesteps)
        levels = [self.coordinates.level(sigma) for sigma in sigmas.double().tolist()]
        if self._ends_noisy(levels):
            levels[-1] = levels[-2]
        exploding = self.name in EXPLODING
        end_scale = self.data_scale / levels[-1].alpha if exploding else 1.0
        return NativeGrid(tuple(levels), timesteps.clone(), sigmas.clone(), end_scale)

    def _ends_noisy(self, levels: Sequence[NoiseLevel]) -> bool:
        """Return whether the native sampler ends at the level of its last call ("sigma_min")."""
        cosmos2 = isinstance(self.coordinates, CosmosSigmas)
        if cosmos2 and self.scheduler.config.get("final_sigmas_type") == "sigma_min":
            return True
        return math.isclose(levels[-1].t, levels[-2].t, abs_tol=1e-6)  # up to rounding

    def _table_grid(self) -> NativeGrid:
        timesteps = self.scheduler.timesteps
        if self.name == PNDM:
            ladder = self.scheduler._timesteps[::-1].copy()
            timesteps = torch.from_numpy(ladder).to(timesteps.device, torch.int64)
        end = getattr(self.scheduler, "final_alpha_cumprod", None)  # DDPM ends at clean data
        levels = [self.coordinates.level_at(n) for n in timesteps.tolist()]
        levels.append(self.coordinates.level_at(-1 if end is None or end == 1 else 0))
        return NativeGrid(tuple(levels), timesteps.clone(), self.sigmas(levels))

    def level_at(self, timestep: float) -> NoiseLevel:
        """Return the noise level of a host timestep; −1 on a table is clean data."""
        return self.coordinates.level_at(timestep)

    def timesteps(self, levels: Sequence[NoiseLevel], grid: NativeGrid) -> Tensor:
        """Return the host timesteps of noise levels between those of the grid, float32."""
        return self.coordinates.timesteps(levels, grid)

    def sigmas(self, levels: Sequence[NoiseLevel]) -> Tensor:
        """Return noise levels in the host's convention, float32, shape (len(levels),)."""
        values = [self.coordinates.sigma(level) for level in levels]
        return torch.tensor(values, dtype=torch.float32)

    # ---- latents ---------------------------------------------------------------------------------

    def noised(self, samples: Tensor, noise: Tensor, levels: Sequence[NoiseLevel]) -> Tensor:
        """Return the latents of clean samples at one noise level, or at one for each row."""
        alpha, sigma = (
            torch.tensor([getattr(level, name) for level in levels], dtype=torch.float32)
            for name in ("alpha", "sigma")
        )
        shape = (-1, *[1] * (samples.ndim - 1))
        alpha, sigma = alpha.to(samples).view(shape), sigma.to(samples).view(shape)
        return alpha / self.data_scale * samples + sigma * noise

    def denoised(self, output: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """Return ẑ for a network output, clipped or thresholded as the native config asks."""
        if output.ndim > 1 and output.shape[1] == 2 * x_t.shape[1]:
            output = output.chunk(2, dim=1)[0]  # the other half is a learned variance
        if self._reading.negated:
            output = -output
        z = denoised(output, x_t, self.coordinates.path(level), self._reading.prediction)
        thresholds = self.config.get("thresholding") and self.config.get("predict_x0", True)
        if thresholds and hasattr(self.scheduler, "_threshold_sample"):
            return self.scheduler._threshold_sample(z)
        return z if self._clip is None else z.clamp(-self._clip, self._clip)


def _check_finite(name: str, values: Tensor) -> None:
    """Refuse a grid that holds what is no number.

    Raises:
        ValueError: with the entries at fault.
    """
    wrong = [
        f"{value} at {i}" for i, value in enumerate(values.tolist()) if not math.isfinite(value)
    ]
    if wrong:
        raise ValueError(
            f"set_timesteps: expected finite {name}, got {', '.join(wrong[:3])} of {len(values)}: "
            "mend the sigmas, timesteps or mu given, or shift and betas in the native config"
        )


def _check_decreasing(grid: NativeGrid) -> None:
    """Refuse a grid whose noise does not decrease from call to call, or is gone before the end.

    Raises:
        ValueError: with the sigmas at fault.
    """
    times, sigmas = [level.t for level in grid.levels], grid.sigmas.tolist()
    last = len(times) - 2
    wrong = [f"{sigmas[i]:.6g} at call {i}" for i, t in enumerate(times[:-1]) if t >= 1]
    for i, (now, then) in enumerate(pairwise(times)):
        if then < now or (then == now and i < last):  # the end may be at the last call
            wrong.append(f"{sigmas[i]:.6g} at call {i} and then {sigmas[i + 1]:.6g}")
    if wrong:
        raise ValueError(
            "set_timesteps: expected noise that decreases from call to call and is there at each "
            f"of them, got sigmas {'; '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''}: mend "
            "the sigmas or timesteps given, or take fewer steps"
        )


def _coordinates(scheduler: Any, config: Mapping[str, Any], noise_scale: float) -> Coordinates:
    """Return the coordinates of a native scheduler of a supported class."""
    name, total = type(scheduler).__name__, config["num_train_timesteps"]
    if is_cosmos2(name, scheduler.config):
        sigma_max, sigma_data = (scheduler.config[key] for key in ("sigma_max", "sigma_data"))
        return CosmosSigmas(VarianceExploding(sigma_max, sigma_data), total)
    if name in FLOW or config.get("use_flow_sigmas"):
        return FlowTimes(total, noise_scale, bool(config.get("invert_sigmas")))
    if name in EDM:
        return ScaledSigmas(config["sigma_data"], EDM_READINGS, cosine=name == COSINE_DPM)
    if config.get("timestep_type") == "continuous":
        return ScaledSigmas(1.0, TABLE_READINGS)  # SVD
    return TableEntries(_table(scheduler, total), total)


def _table(scheduler: Any, total: int) -> VariancePreserving:
    """Return the table of a native scheduler, of which the first `total` entries are timesteps.

    Raises:
        UnsupportedScheduler: if its ᾱ do not decrease, or are fewer.
    """
    table = scheduler.alphas_cumprod.cpu().double().tolist()[:total]
    if len(table) < total:
        raise UnsupportedScheduler(
            f"num_train_timesteps: expected one for each beta, {len(table)}, got {total}: set it "
            "to the length of trained_betas"
        )
    raised = scheduler.config.get("rescale_betas_zero_snr") and table[-1] == NEARLY_ZERO
    if raised and table[-1] >= min(table[:-1], default=1.0):
        table[-1] = 0.0  # as it was rescaled, before it was raised above its neighbours
    try:
        return VariancePreserving(table)
    except ValueError:
        raise UnsupportedScheduler(
            "betas: expected noise that grows with every training timestep, got ᾱ from "
            f"{table[0]:.6g} to {table[-1]:.6g} that does not decrease strictly within [0, 1): "
            "mend beta_start, beta_end, beta_schedule or trained_betas of the native config"
        ) from None
