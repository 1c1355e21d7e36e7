"""What is particular to each native diffusers scheduler: config ↔ class, grid, noise schedule, prediction, refusals.

The native object itself computes the grid (shifting, spacing, karras sigmas …); here it is only read.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import diffusers
import numpy as np
import torch
from torch import Tensor

from .flow.denoise import Prediction, denoised
from .flow.noise import NoiseLevel, NoiseSchedule, RectifiedFlow, VariancePreserving

TABLE = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")  # step over entries of alphas_cumprod
SIGMAS = ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler")  # step over σ/α of a table, or over flow sigmas
FLOW = ("FlowMatchEulerDiscreteScheduler",)  # step over σ of the straight path
SUPPORTED = FLOW + TABLE + SIGMAS


@dataclass(frozen=True)
class NativeGrid:
    """The grid a native scheduler chose for N network calls.

    Args:
        levels: N + 1 noise levels, noise first; the last is where the native sampler ends.
        timesteps: What the network is told at each call, shape (N,), on the device asked for.
        sigmas: The host's noise levels, shape (N + 1,), float32.
    """

    levels: tuple[NoiseLevel, ...]
    timesteps: Tensor
    sigmas: Tensor


def class_name(config: Mapping[str, Any]) -> str:
    """Return the native class a scheduler config belongs to.

    Raises:
        ValueError: if the class has no GLASS counterpart, or the config does not say and its keys fit no class.
    """
    name = config.get("_class_name")
    if name is None:
        keys = {key for key in config if not key.startswith("_")}
        name = next((known for known in SUPPORTED if parameters(known) == keys), None)
    if name is None:
        raise ValueError(
            "config: it has no '_class_name' and its keys are those of no supported scheduler: "
            "use GLASSScheduler.from_scheduler(pipe.scheduler), which reads the class off the object"
        )
    return check_class(name)


def check_class(name: str) -> str:
    """Return the name of a supported native class; raise ValueError for any other."""
    if name not in SUPPORTED:
        raise ValueError(
            f"scheduler: expected one of {', '.join(SUPPORTED)}, got {name}, which has no GLASS counterpart: "
            "give the pipeline one of these schedulers first, e.g. DDIMScheduler.from_config(pipe.scheduler.config)"
        )
    return name


def build(config: Mapping[str, Any]) -> Any:
    """Return a native scheduler built from its own config, which must name its class."""
    name = class_name(config)
    known = parameters(name)
    return getattr(diffusers, name)(**{key: value for key, value in config.items() if key in known})


def parameters(name: str) -> set[str]:
    """Return the config keys of a native class."""
    return set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}


class Native:
    """A native scheduler, read as grid, noise schedule and prediction type.

    Args:
        scheduler: The native object; it is used, not copied.

    Raises:
        ValueError: if its class or its prediction type is not supported.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.name = check_class(type(scheduler).__name__)
        known = parameters(self.name)  # other keys are what an earlier class left behind
        config = self.config = {key: value for key, value in scheduler.config.items() if key in known}
        self.num_train_timesteps: int = config["num_train_timesteps"]
        self.is_flow = self.name in FLOW or bool(config.get("use_flow_sigmas"))
        self.inverted = bool(config.get("invert_sigmas"))
        if config.get("timestep_type") == "continuous":
            raise ValueError(
                "timestep_type: expected 'discrete', got 'continuous' (a network told log σ / 4): not supported"
            )
        self.prediction: Prediction = self._prediction(config)
        self.schedule: NoiseSchedule = (
            RectifiedFlow() if self.is_flow else VariancePreserving(scheduler.alphas_cumprod.double().tolist())
        )

    def _prediction(self, config: Any) -> Prediction:
        if self.name in FLOW:
            return "velocity"
        kind = config["prediction_type"]
        expected = ("flow_prediction",) if self.is_flow else ("epsilon", "v_prediction", "sample")
        if kind not in expected:
            raise ValueError(f"prediction_type: expected one of {expected} for {self.name}, got {kind!r}")
        return "velocity" if self.is_flow else cast(Prediction, kind)

    def grid(self, num_inference_steps: int | None, device: Any, **given: Any) -> NativeGrid:
        """Let the native scheduler lay its grid, with whatever the host gave it (`sigmas`, `mu`, `timesteps`).

        Raises:
            ValueError: if the native scheduler does not take what the host gave, or its sigmas are no flow times.
        """
        given = {key: value for key, value in given.items() if value is not None}
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        refused = [key for key in given if key not in accepted]
        if refused:
            raise ValueError(f"set_timesteps: {self.name} takes no {', '.join(refused)}: leave them out")
        if num_inference_steps is not None:
            given["num_inference_steps"] = num_inference_steps
        self.scheduler.set_timesteps(device=device, **given)
        timesteps = self.scheduler.timesteps
        if self.name in TABLE:
            return self._table_grid(timesteps)
        sigmas = self.scheduler.sigmas.detach().cpu().double().tolist()
        levels = tuple(self._flow_level(s) if self.is_flow else self._level(s) for s in sigmas)
        return NativeGrid(levels, timesteps.clone(), self.scheduler.sigmas.detach().float().cpu().clone())

    def _table_grid(self, timesteps: Tensor) -> NativeGrid:
        if self.name == "PNDMScheduler":  # its list repeats entries for its multistep start
            ladder = self.scheduler._timesteps[::-1].copy()
            timesteps = torch.from_numpy(ladder).to(timesteps.device, torch.int64)
        end = getattr(self.scheduler, "final_alpha_cumprod", None)  # DDPM ends at clean data
        levels = [self.level_at(n) for n in timesteps.tolist()]
        levels.append(self.level_at(-1 if end is None or end == 1 else 0))
        return NativeGrid(tuple(levels), timesteps.clone(), self.sigmas(levels))

    def _flow_level(self, sigma: float) -> NoiseLevel:
        if not 0 <= sigma <= 1:
            raise ValueError(f"sigmas: expected flow times in [0, 1], got {sigma:.6g} (a variance-exploding model?)")
        return self.schedule.level(sigma if self.inverted else 1 - sigma)

    def _level(self, ratio: float) -> NoiseLevel:
        """Noise level of σ/α = `ratio`."""
        norm = math.hypot(1.0, ratio)
        return NoiseLevel(self.schedule.time(ratio**-2 if ratio else math.inf), 1 / norm, ratio / norm)

    def level_at(self, timestep: float) -> NoiseLevel:
        """Return the noise level of a host timestep; −1 on a table is clean data."""
        if self.is_flow:
            return self._flow_level(timestep / self.num_train_timesteps)
        return self.schedule.level(1 - (timestep + 1) / self.num_train_timesteps)

    def labels(self, levels: Sequence[NoiseLevel], grid: NativeGrid) -> Tensor:
        """Return the host timesteps of noise levels between those of the grid, float32, by interpolation."""
        end = self.num_train_timesteps * (1 - grid.levels[-1].t) if self.is_flow else 0.0
        known = [*grid.timesteps.cpu().double().tolist(), self.num_train_timesteps - end if self.inverted else end]
        values = np.interp([level.t for level in levels], [level.t for level in grid.levels], known)
        return torch.tensor(values, dtype=torch.float32, device=grid.timesteps.device)

    def sigmas(self, levels: Sequence[NoiseLevel]) -> Tensor:
        """Return noise levels in the host's convention, float32, shape (len(levels),)."""
        if self.is_flow:
            values = [level.t if self.inverted else level.sigma for level in levels]
        else:
            values = [level.sigma / level.alpha if level.alpha else math.inf for level in levels]
        return torch.tensor(values, dtype=torch.float32)

    def denoised(self, output: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """Return ẑ for a network output, clipped or thresholded exactly as the native scheduler's config asks."""
        if output.ndim > 1 and output.shape[1] == 2 * x_t.shape[1]:  # the other half is a learned variance
            output = output.chunk(2, dim=1)[0]
        z = denoised(-output if self.inverted else output, x_t, level, self.prediction)
        if self.config.get("thresholding"):
            return self.scheduler._threshold_sample(z)
        if self.config.get("clip_sample"):
            limit = self.config.get("clip_sample_range", 1.0)
            return z.clamp(-limit, limit)
        return z
