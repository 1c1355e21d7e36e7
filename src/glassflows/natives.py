"""What is particular to each native diffusers scheduler: config ↔ class, grid, noise schedule, prediction, refusals.

The native object itself computes the grid (shifting, spacing, karras sigmas …); here it is only read.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import diffusers
import numpy as np
import torch
from torch import Tensor

from .flow.denoise import Prediction, denoised
from .flow.noise import NoiseLevel, NoiseSchedule, RectifiedFlow, Trigonometric, VarianceExploding, VariancePreserving

HEUN = ("FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler")  # their lists name each call but the first twice
FLOW = ("FlowMatchEulerDiscreteScheduler", "HeliosScheduler", HEUN[0])  # step over σ of the straight path
_DDPM = ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "UnCLIPScheduler")
TABLE = (*_DDPM, "PNDMScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")  # step over alphas_cumprod
CLIPPED = (*_DDPM, HEUN[1])  # honour `clip_sample`
EDM = ("EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler")  # step over σ, data of a given scale
EXPLODING = (  # step over x = z + σ ε
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    HEUN[1],
    *EDM,
)
SIGMAS = (  # step over σ/α of a table, or over flow sigmas
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
)
SUPPORTED = (*FLOW, *TABLE, *EXPLODING, *SIGMAS)

_SIBLING = "give the pipeline {0}.from_config(pipe.scheduler.config) first"
_DISTILLED = "its network was distilled to jump to data, so it gives no denoised mean to sample from"
_REASONS = {
    _DISTILLED: (
        "CMStochasticIterativeScheduler", "ConsistencyDecoderScheduler", "FlowMapEulerDiscreteScheduler",
        "FlowMatchLCMScheduler", "HeliosDMDScheduler", "LCMScheduler", "PiflowScheduler", "SCMScheduler",
        "TCDScheduler",
    ),
    "it makes two network calls per step; " + _SIBLING.format("EulerDiscreteScheduler"): (
        "DPMSolverSDEScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    ),
    "it is another sampler of the same models; " + _SIBLING.format("FlowMatchEulerDiscreteScheduler"): (
        "LTXEulerAncestralRFScheduler",
    ),
    "its pipelines step it twice per timestep (Cosmos 1); with a model of the SDXL kind, "
    + _SIBLING.format("EDMDPMSolverMultistepScheduler"): ("EDMEulerScheduler",),
    "its times are ratios on a path of their own (Würstchen, Stable Cascade)": ("DDPMWuerstchenScheduler",),
    "it runs from data to noise": ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"),
    "it samples discrete tokens": (
        "AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler",
        "VQDiffusionScheduler",
    ),
}  # fmt: skip
_COSMOS2 = ("sigma_data", "sigma_max", "sigma_min", "final_sigmas_type")  # which its pipelines add to the config
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names}


@dataclass(frozen=True)
class NativeGrid:
    """The grid a native scheduler chose for N network calls.

    Args:
        levels: N + 1 noise levels, noise first; the last is where the native sampler ends.
        timesteps: What the network is told at each call, shape (N,), on the device asked for.
        sigmas: The host's noise levels, shape (N + 1,), float32.
        end_scale: What the native sampler's last sample is of x at the last level.
    """

    levels: tuple[NoiseLevel, ...]
    timesteps: Tensor
    sigmas: Tensor
    end_scale: float = 1.0


def class_name(config: Mapping[str, Any]) -> str:
    """Return the native class a scheduler config belongs to.

    Raises:
        ValueError: if the class has no GLASS counterpart, or the config does not say and its keys fit no class.
    """
    name = config.get("_class_name")
    if name is None:
        keys = {key for key in config if not key.startswith("_")}
        fitting = [known for known in (*SUPPORTED, *REFUSED) if keys and parameters(known) == keys]
        if not fitting or any(REFUSED.get(known) == _DISTILLED for known in fitting):
            raise ValueError(
                f"config: it has no '_class_name' and its keys are those of {' or '.join(fitting) or 'no scheduler'}: "
                "use GLASSScheduler.from_scheduler(pipe.scheduler), which reads the class off the object"
            )
        name = fitting[0]
    return check_class(name)


def current(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the native part of the config of a GLASSScheduler, as hosts may have rewritten it since.

    Stable Diffusion's constructor mends old configs, that of Cosmos 2 adds to them; they know the visible keys only.
    """
    native = dict(config["native"])
    added = _COSMOS2 if _explodes(native["_class_name"], config) else ()
    return native | {key: config[key] for key in (*native, *added) if key in config and not key.startswith("_")}


def check_class(name: str) -> str:
    """Return the name of a supported native class; raise ValueError with the reason for any other."""
    if name in SUPPORTED:
        return name
    reason = REFUSED.get(name, f"expected one of {', '.join(SUPPORTED)}")
    raise ValueError(f"scheduler: got {name}, which has no GLASS counterpart: {reason}")


def build(config: Mapping[str, Any]) -> Any:
    """Return a native scheduler built from its own config, which must name its class."""
    name = class_name(config)
    known = parameters(name) - set(config.get("_use_default_values", ()))  # stay defaults, for the way to other classes
    scheduler = getattr(diffusers, name)(**{key: value for key, value in config.items() if key in known})
    if _explodes(name, config):
        scheduler.register_to_config(**{key: config[key] for key in _COSMOS2 if key in config})
    return scheduler


def _explodes(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a flow scheduler is run on x = z + σ ε, as the pipelines of Cosmos 2 do, which note it in its config."""
    return name in FLOW and "sigma_data" in config


def written(scheduler: Any) -> dict[str, Any]:
    """Return the config of a native scheduler as JSON can hold it, its class included."""
    config = {key: plain(value) for key, value in scheduler.config.items() if not key.startswith("_")}
    config = {key: value for key, value in config.items() if key not in ("native", "glass")}
    return {"_class_name": type(scheduler).__name__, **config}


def plain(value: Any) -> Any:
    """Return a numpy number or array as Python's own, a function by its name."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return repr(value) if callable(value) else value


def parameters(name: str) -> set[str]:
    """Return the config keys of a native class; none where the installed diffusers lacks the class."""
    native = getattr(diffusers, name, None)
    return set(inspect.signature(native.__init__).parameters) - {"self"} if native else set()


class Native:
    """A native scheduler, read as grid, noise schedule and prediction type.

    Hosts of σ-stepping natives hand their networks `x / √(σ² + σ_data²)`. These inputs, variance-preserving and of data
    scaled to variance one, are the latents here, hence no scaling of inputs or of the initial noise.

    Args:
        scheduler: The native object; it is used, not copied.
        noise_scale: Standard deviation of the noise, where it is a flow.

    Raises:
        ValueError: if its class, its prediction type or another setting is not supported.
    """

    def __init__(self, scheduler: Any, noise_scale: float = 1.0) -> None:
        self.scheduler = scheduler
        self.name = check_class(type(scheduler).__name__)
        known = parameters(self.name)  # other keys are what an earlier class left behind
        config = self.config = {key: value for key, value in scheduler.config.items() if key in known}
        self.num_train_timesteps: int = config["num_train_timesteps"]
        self.is_exploding_flow = _explodes(self.name, scheduler.config)
        self.is_flow = (self.name in FLOW or bool(config.get("use_flow_sigmas"))) and not self.is_exploding_flow
        self.inverted = bool(config.get("invert_sigmas"))
        self.continuous = self.name in EDM or config.get("timestep_type") == "continuous"
        self.data_scale: float = config["sigma_data"] if self.name in EDM else 1.0
        if config.get("stages", 1) > 1:
            raise ValueError(f"stages: expected 1, got {config['stages']}: a pyramid changes its resolution as it goes")
        if not noise_scale > 0 or (noise_scale != 1 and not self.is_flow):
            raise ValueError(f"noise_scale: expected a positive number, 1 where it is no flow, got {noise_scale}")
        self.prediction: Prediction = self._prediction()
        self.schedule: NoiseSchedule = RectifiedFlow(noise_scale) if self.is_flow else self._schedule()

    def _schedule(self) -> NoiseSchedule:
        if self.is_exploding_flow:
            return VarianceExploding(*(self.scheduler.config[key] for key in ("sigma_max", "sigma_data")))
        if self.continuous:
            return Trigonometric()
        return VariancePreserving(self.scheduler.alphas_cumprod.double().tolist())

    def _prediction(self) -> Prediction:
        if self.is_exploding_flow:
            return "epsilon"  # a velocity dx/dσ
        if self.name in FLOW:
            return "velocity"
        kind = self.config["prediction_type"]
        if self.is_flow:
            expected = ("flow_prediction",)
        elif self.name in EDM:
            expected = ("epsilon", "v_prediction")
        else:
            expected = ("epsilon", "v_prediction", "sample")
        if kind not in expected:
            raise ValueError(f"prediction_type: expected one of {expected} for {self.name}, got {kind!r}")
        if self.name in EDM:  # F is ∓ the v of the scaled data
            return "v_prediction"
        return "velocity" if self.is_flow else cast(Prediction, kind)

    def grid(self, num_inference_steps: int | None, device: Any, **given: Any) -> NativeGrid:
        """Let the native scheduler lay its grid, with whatever the host gave it (`sigmas`, `mu`, `timesteps`).

        Of the lists of PNDM and Heun the entries that they repeat are dropped: one network call for each. A `mu` that
        no dynamic shifting asks for is ignored.

        Raises:
            ValueError: if the native scheduler does not take what the host gave, or its noise does not decrease.
        """
        if not self.config.get("use_dynamic_shifting"):
            given["mu"] = None  # FLUX's pipeline, among others, always sends one
        elif given.get("mu") is None:
            raise ValueError(
                "set_timesteps: expected mu, which use_dynamic_shifting needs, got none: a pipeline that sends it to a "
                "FlowMatchEulerDiscreteScheduler only (Bria, EasyAnimate) needs GLASSFlowMatchScheduler"
            )
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps: expected at least 1, got {num_inference_steps}")
        given = {key: value for key, value in given.items() if value is not None}
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        refused = [key for key in given if key not in accepted]
        if refused:
            raise ValueError(f"set_timesteps: {self.name} takes no {', '.join(refused)}: leave them out")
        if num_inference_steps is not None:
            given["num_inference_steps"] = num_inference_steps
        self.scheduler.set_timesteps(device=device, **given)
        grid = self._table_grid() if self.name in TABLE else self._sigma_grid()
        *times, end = [level.t for level in grid.levels]
        if any(then <= now for now, then in pairwise(times)) or end < times[-1] or times[-1] >= 1:
            shown = ", ".join(f"{sigma:.4g}" for sigma in grid.sigmas[:8].tolist())
            raise ValueError(
                f"set_timesteps: expected noise that decreases from call to call and is there at each of them, got "
                f"sigmas {shown} …: mend the sigmas or timesteps given, or take fewer steps"
            )
        return grid

    def _sigma_grid(self) -> NativeGrid:
        host, timesteps = self.scheduler.sigmas.detach().float().cpu(), self.scheduler.timesteps
        if self.name in HEUN:
            host, timesteps = torch.cat([host[:1], host[1::2]]), torch.cat([timesteps[:1], timesteps[1::2]])
        levels = [self._level(sigma) for sigma in host.double().tolist()]
        cosmos2 = self.is_exploding_flow and self.scheduler.config.get("final_sigmas_type") == "sigma_min"
        if cosmos2 or math.isclose(levels[-1].t, levels[-2].t, abs_tol=1e-6):  # "sigma_min", up to rounding
            levels[-1] = levels[-2]
        end_scale = self.data_scale / levels[-1].alpha if self.name in EXPLODING else 1.0
        return NativeGrid(tuple(levels), timesteps.clone(), host.clone(), end_scale)

    def _table_grid(self) -> NativeGrid:
        timesteps = self.scheduler.timesteps
        if self.name == "PNDMScheduler":
            ladder = self.scheduler._timesteps[::-1].copy()
            timesteps = torch.from_numpy(ladder).to(timesteps.device, torch.int64)
        end = getattr(self.scheduler, "final_alpha_cumprod", None)  # DDPM ends at clean data
        levels = [self.level_at(n) for n in timesteps.tolist()]
        levels.append(self.level_at(-1 if end is None or end == 1 else 0))
        return NativeGrid(tuple(levels), timesteps.clone(), self.sigmas(levels))

    def _level(self, sigma: float) -> NoiseLevel:
        """Return the level of one of the native scheduler's sigmas."""
        if self.is_flow:
            if not 0 <= sigma <= 1:
                raise ValueError(
                    f"sigmas: expected flow times in [0, 1], got {sigma:.6g}: a pipeline that asks for "
                    "FlowMatchEulerDiscreteScheduler by isinstance (Bria) needs GLASSFlowMatchScheduler"
                )
            return self.schedule.level(sigma if self.inverted else 1 - sigma)
        if self.is_exploding_flow:
            return NoiseLevel(self.schedule.time(sigma**-2 if sigma else math.inf), 1.0, sigma)
        ratio = sigma / self.data_scale
        norm = math.hypot(1.0, ratio)
        return NoiseLevel(self.schedule.time(ratio**-2 if ratio else math.inf), 1 / norm, ratio / norm)

    def level_at(self, timestep: float) -> NoiseLevel:
        """Return the noise level of a host timestep; −1 on a table is clean data."""
        if self.is_flow or self.is_exploding_flow:
            return self._level(timestep / self.num_train_timesteps)
        if self.name == "CosineDPMSolverMultistepScheduler":
            return self._level(math.tan(math.pi / 2 * timestep))
        if self.continuous:
            return self._level(math.exp(4 * timestep))
        return self.schedule.level(max(0.0, 1 - (timestep + 1) / self.num_train_timesteps))

    def labels(self, levels: Sequence[NoiseLevel], grid: NativeGrid) -> Tensor:
        """Return the host timesteps of noise levels between those of the grid, float32.

        By interpolation: also a host whose timesteps are no function of its sigmas (CogView 4) has those of the grid.
        """
        if self.continuous:
            sigmas = self.sigmas(levels)
            cosine = self.name == "CosineDPMSolverMultistepScheduler"
            values = sigmas.atan() / math.pi * 2 if cosine else 0.25 * sigmas.log()
            return values.to(grid.timesteps.device)
        end = self.num_train_timesteps * (1 - grid.levels[-1].t) if self.is_flow else 0.0
        known = [*grid.timesteps.cpu().double().tolist(), self.num_train_timesteps - end if self.inverted else end]
        values = np.interp([level.t for level in levels], [level.t for level in grid.levels], known)
        return torch.tensor(values, dtype=torch.float32, device=grid.timesteps.device)

    def sigmas(self, levels: Sequence[NoiseLevel]) -> Tensor:
        """Return noise levels in the host's convention, float32, shape (len(levels),)."""
        if self.is_flow:
            values = [level.t if self.inverted else 1 - level.t for level in levels]
        else:
            values = [self.data_scale / level.root_snr if level.alpha else math.inf for level in levels]
        return torch.tensor(values, dtype=torch.float32)

    def noised(self, samples: Tensor, noise: Tensor, levels: Sequence[NoiseLevel]) -> Tensor:
        """Return the latents of clean samples at one noise level, or at one for each row."""
        alpha, sigma = (
            torch.tensor([getattr(level, name) for level in levels], dtype=torch.float32).to(samples)
            for name in ("alpha", "sigma")
        )
        shape = (-1, *[1] * (samples.ndim - 1))
        return alpha.view(shape) / self.data_scale * samples + sigma.view(shape) * noise

    def denoised(self, output: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """Return ẑ for a network output, clipped or thresholded exactly as the native scheduler's config asks."""
        if output.ndim > 1 and output.shape[1] == 2 * x_t.shape[1]:  # the other half is a learned variance
            output = output.chunk(2, dim=1)[0]
        flipped = self.inverted or (self.name in EDM and self.config["prediction_type"] == "epsilon")
        path = NoiseLevel(level.t, level.t, 1 - level.t) if self.is_flow else level  # a velocity is dx/dt, scale or no
        z = denoised(-output if flipped else output, x_t, path, self.prediction)
        thresholds = hasattr(self.scheduler, "_threshold_sample") and self.config.get("predict_x0", True)
        if self.config.get("thresholding") and thresholds:
            return self.scheduler._threshold_sample(z)
        if self.config.get("clip_sample") and self.name in CLIPPED:
            limit = self.config["clip_sample_range"]
            return z.clamp(-limit, limit)
        return z
