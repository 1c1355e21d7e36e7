"""GLASSScheduler: `flow.sample` turned inside out for the loop of a diffusers pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from . import natives
from .flow.solver import InnerGrid, Solver
from .flow.state import InnerState, advance, correct, leave, moved, network_input, start
from .flow.transition import Correlations, check_correlations
from .natives import Native
from .plan import FirstTransition, Plan, PlannedCall, Transitions
from .randomness import Generators, NoiseSource, check_initial_noise

_OWN = ("num_transitions", "correlation", "solver_order", "corrector", "inner_grid", "first_transition", "noise_scale")
_CLASSES = ("GLASSScheduler", "GLASSFlowMatchScheduler")

TransitionHook = Callable[[int, Tensor, Tensor], Tensor | None]


@dataclass
class GLASSSchedulerOutput(BaseOutput):
    """Output of `GLASSScheduler.step`.

    Args:
        prev_sample: The next network input, shape and dtype of `sample`.
        pred_original_sample: The denoised prediction ẑ of this call, same shape and dtype.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class _Progress(NamedTuple):
    """Where a run is: its next call, the state of its transition, and what the pipeline was handed last."""

    next_call: int
    state: InnerState
    returned: Tensor | None


class GLASSScheduler(SchedulerMixin, ConfigMixin):
    """Sample a pipeline's model by GLASS transitions, at the network calls and times of its native scheduler.

        pipe.scheduler = GLASSScheduler.from_config(pipe.scheduler.config)

    `num_inference_steps` counts network calls, as with any scheduler of order 1; they are split into `num_transitions`
    contiguous stochastic transitions, each of them an ODE. With one transition this is the native ODE sampler, with as
    many transitions as calls DDPM ancestral sampling.

    The noise between transitions comes from the generator given to `step`, else from the one given to `set_generator`,
    else from one generator per row, seeded by that row's initial latents: `pipe(generator=g)` reproduces the images of
    every pipeline, also of those that pass no generator to `step`.

    Args:
        native: Config of the native scheduler with its `_class_name`; `from_config` and `from_scheduler` fill it in.
        num_transitions: Number K of transitions, clipped to the number of calls.
        correlation: Noise correlation ρ between the states of a transition: "ddpm" or a number in [-1, 1], a list with
            one per transition (the first does not use its own), or a function (t, t′) ↦ ρ, which a saved config can
            only name.
        solver_order: 1 for Euler, 2 for the two-step predictor.
        corrector: Whether order 2 corrects each step once its end has been evaluated, at no further call.
        inner_grid: "time" (calls on the native grid) or "condot" (the paper's uniform s).
        first_transition: "ode" starts from the initial latents as they are, the ODE; "posterior" draws noise there too,
            so that one transition draws from p(z | initial latents), of which a noised image (img2img) has many.
        noise_scale: Standard deviation of the initial noise; 1 but for PRX-Pixel, whose `pipe.config` names it.

    Raises:
        ValueError: if an option is none of the above, or the native scheduler has no GLASS counterpart.

    Reference:
        Holderrieth et al., GLASS Flows, arXiv:2509.25170.
    """

    order = 1
    init_noise_sigma = 1.0
    model_outputs, last_sample = (), None  # which ChronoEdit looks through for frames to drop
    _compatibles: ClassVar = list(natives.SUPPORTED)

    @register_to_config
    def __init__(
        self,
        native: dict[str, Any] | None = None,
        *,
        num_transitions: int = 5,
        correlation: Correlations = "ddpm",
        solver_order: int = 2,
        corrector: bool = True,
        inner_grid: InnerGrid = "time",
        first_transition: FirstTransition = "ode",
        noise_scale: float = 1.0,
    ) -> None:
        self._transitions = Transitions(
            num_transitions,
            check_correlations(correlation),
            first_transition,
            Solver(solver_order, corrector, inner_grid),
        )
        self._options = {key: self.config[key] for key in _OWN}  # as given
        self._wrap(natives.build(native or {"_class_name": "FlowMatchEulerDiscreteScheduler"}))

        self.on_transition: TransitionHook | None = None
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(self._native.num_train_timesteps - 1, -1, -1)
        self.sigmas = torch.empty(0)
        self._plan: Plan | None = None
        self._noise = NoiseSource()
        self._reset()

    # ---- construction ------------------------------------------------------------------------------------------------

    def _wrap(self, scheduler: Any) -> None:
        """Read this native scheduler from now on, its config visible beside our own as hosts expect it."""
        self._native = Native(scheduler, self._options["noise_scale"])
        native = natives.written(scheduler)
        own = {key: natives.plain(value) for key, value in self._options.items()}
        # native keys win where the names meet (solver_order of DPM++), so that they survive the way back
        visible = {**own, **native, "_class_name": type(self).__name__}
        if "_use_default_values" in {**self.config, **scheduler.config}:  # those that other classes may set anew
            visible["_use_default_values"] = list(scheduler.config.get("_use_default_values", ()))
        self.register_to_config(**visible, native=native, glass=own)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **options: Any) -> Any:  # type: ignore[override]
        """Build the GLASS counterpart of the scheduler a config belongs to.

        Args:
            config: `pipe.scheduler.config`, or the config of a GLASSScheduler.
            return_unused_kwargs: Also return the options that were not used (none: unknown ones are an error).
            options: Options of `GLASSScheduler`, and native keys to override (`shift=3.0`).

        Raises:
            TypeError: if an option is known neither to GLASSScheduler nor to the native scheduler.
            ValueError: if the native class is not supported or cannot be told from the config.
        """
        if not isinstance(config, Mapping):
            hint = "pass pipe.scheduler.config, or use GLASSScheduler.from_pretrained for a path"
            raise TypeError(f"config: expected a scheduler's config, got {type(config).__name__}: {hint}")
        if config.get("_class_name") in _CLASSES:
            native, own = natives.current(config), dict(config["glass"])
            own |= {key: config[key] for key in own if key in config and key not in native}  # edited since
        else:
            native, own = {**config, "_class_name": natives.class_name(config)}, {}
        own |= {key: options.pop(key) for key in _OWN if key in options}
        if unknown := [key for key in options if key not in natives.parameters(native["_class_name"])]:
            raise TypeError(
                f"from_config: unknown option {', '.join(unknown)}; GLASSScheduler takes {', '.join(_OWN)} "
                f"and the keys of {native['_class_name']}"
            )
        native["_use_default_values"] = [key for key in config.get("_use_default_values", ()) if key not in options]
        scheduler = cls(native=native | options, **own)
        scheduler.register_to_config(**{key: config[key] for key in ("_diffusers_version",) if key in config})
        return (scheduler, {}) if return_unused_kwargs else scheduler

    @classmethod
    def from_scheduler(cls, scheduler: Any, **options: Any) -> GLASSScheduler:
        """Build the GLASS counterpart of a scheduler object, exactly as it stands; the object itself is left alone.

        Args:
            scheduler: `pipe.scheduler`, native or a GLASSScheduler.
            options: Options of `GLASSScheduler` (which win over those of a GLASSScheduler).
        """
        if not hasattr(scheduler, "config"):
            raise TypeError(f"scheduler: expected pipe.scheduler, got {type(scheduler).__name__}")
        is_glass = isinstance(scheduler, GLASSScheduler)
        native = scheduler._native.scheduler if is_glass else scheduler
        own = scheduler._options if is_glass else {}
        new = cls({**native.config, "_class_name": type(native).__name__}, **(own | options))
        new._wrap(copy.deepcopy(native))
        if is_glass:
            new._noise.generator = scheduler._noise.generator
        return new

    def set_generator(self, generator: Generators | None) -> None:
        """Draw the noise of later runs from a generator or a list of them, one per row; None: from the latents."""
        self._noise.generator = generator

    def __deepcopy__(self, memo: dict[int, Any]) -> GLASSScheduler:
        """Copy the scheduler; the copy draws an independent stream of noise, and has the hook that the hook names."""
        new = object.__new__(type(self))
        new.__dict__ = copy.deepcopy({**self.__dict__, "on_transition": None}, memo)
        follow = getattr(self.on_transition, "follow", None)
        new.on_transition = follow() if follow else None
        return new

    # ---- the grid ----------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Lay the network calls of the next run; the native scheduler computes the grid from the same arguments.

        Args:
            num_inference_steps: Number of network calls.
            device: Device of `timesteps`.
            sigmas: Noise levels before shifting, where the native scheduler takes them.
            mu: Shift of resolution-dependent natives.
            timesteps: Custom timesteps, where the native scheduler takes them.

        Raises:
            ValueError: if the native scheduler does not take these arguments.
        """
        given = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps}
        if (native := natives.current(self.config)) != self.config["native"]:
            self._wrap(natives.build(native))
        plan = self._plan = Plan(self._native, self._transitions, num_inference_steps, device, **given)
        self._reset()
        self.timesteps, self.sigmas, self._end_scale = plan.timesteps, plan.sigmas, plan.end_scale
        self.num_inference_steps = len(self.timesteps)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say where in `timesteps` the run begins (img2img)."""
        self._begin_index = begin_index

    @property
    def begin_index(self) -> int | None:
        """Where in `timesteps` the run begins, if the pipeline said so or the run has begun."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """Index in `timesteps` of the next network call; None before the first step of a run."""
        return None if self._progress is None else self._progress.next_call

    def __len__(self) -> int:
        return self._native.num_train_timesteps

    # ---- the run -----------------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        self._begin_index: int | None = None
        self._calls: list[PlannedCall] = []
        self._progress: _Progress | None = None
        self._noise.reset()

    def _start(self, timestep: Any, sample: Tensor, generator: Generators | None) -> _Progress:
        """Begin a run: find its first call, lay the transitions over what remains, seed the noise."""
        if self._plan is None:
            raise ValueError("step: no timetable yet: call set_timesteps first")
        begin = self._begin_index = self._plan.find(float(timestep)) if self._begin_index is None else self._begin_index
        self._calls = self._plan.calls(begin)
        block = self._calls[begin].block
        check_initial_noise(sample, block.transition.t)
        self._noise.begin(sample, generator)
        return _Progress(begin, start(sample.float(), block), None)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
        per_token_timesteps: Tensor | None = None,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        prev_timestep: Any = None,
    ) -> GLASSSchedulerOutput | tuple[Tensor, Tensor]:
        """Take one inner step, and where it ends a transition, the transition.

        Args:
            model_output: What the network predicted for `sample`, shape (N, *event).
            timestep: The entry of `timesteps` it was told; read in the first step of a run only.
            sample: The network's input, shape (N, *event); edits made to it since the last step are carried along.
            generator: Source of the noise, or a list of one per row; see the class for the default.
            return_dict: Return a `GLASSSchedulerOutput`; else the tuple (prev_sample, pred_original_sample).
            per_token_timesteps: Given by LTX-Condition, which negates its velocity and itself puts back tokens not due.
            eta, use_clipped_model_output, prev_timestep: Sent by `DDIMPipeline` and unCLIP priors; DDIM's η is
                `num_transitions` here, steps are along the clipped prediction and to the next timestep.

        Raises:
            ValueError: before `set_timesteps`, after the last timestep of a run, where a sample's shape changed, and
                for an `eta` other than 0.
        """
        if eta:
            raise ValueError(f"eta: expected 0, got {eta}: num_transitions sets how stochastic the sampler is")
        progress = self._progress or self._start(timestep, sample, generator)
        if progress.next_call == len(self.timesteps):
            raise ValueError("step: the run has ended: call set_timesteps to begin another")
        k, block, i, draws = self._calls[progress.next_call]
        inner_step, x, state = block.steps[i], sample.float(), progress.state
        if progress.returned is not None:
            if sample.shape != (shape := progress.returned.shape):
                hint = "pipelines that drop rows or frames within a run are not supported"
                raise ValueError(f"step: expected a sample of shape {tuple(shape)}, got {tuple(sample.shape)}: {hint}")
            state = moved(inner_step, state, x, progress.returned.float())
        model_output = model_output.float() if per_token_timesteps is None else -model_output.float()
        denoised = self._native.denoised(model_output, x, inner_step.level)
        state = correct(inner_step, state, denoised)
        if i == 0:
            scale = self._native.data_scale
            ancestors = self.on_transition(k, sample, scale * denoised) if self.on_transition else None
            if ancestors is not None:
                state, denoised = state.select(ancestors), denoised[ancestors]
            if draws:
                state = replace(state, innovation=self._noise.draw(x, generator))
        state = advance(inner_step, state, denoised)
        if i + 1 < len(block.steps):
            previous = network_input(block.steps[i + 1], state)
        else:
            previous, state = leave(block, state)
        next_call = progress.next_call + 1
        if next_call == len(self.timesteps):
            previous = self._end_scale * previous
        previous = previous.to(sample.dtype)
        self._progress = _Progress(next_call, state, previous.clone())
        denoised = (self._native.data_scale * denoised).to(sample.dtype, copy=True)
        return GLASSSchedulerOutput(previous, denoised) if return_dict else (previous, denoised)

    # ---- noising, for img2img and inpainting -------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample as it is: network inputs need no scaling.

        Raises:
            ValueError: for a number, which only a pipeline asks for that computes in σ coordinates of its own.
        """
        if sample.ndim == 0:
            raise ValueError(
                "scale_model_input: expected a sample, got a number: pipelines that scale their sigmas themselves "
                "(the latent upscaler) are not supported"
            )
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return α_t z + σ_t ε at host timesteps, shape (N,) or scalar; z and ε of shape (N, *event)."""
        index = self._begin_index if self.step_index is None else self.step_index
        level = self._native.level_at if self._plan is None else partial(self._plan.level, index=index)
        levels = [level(timestep) for timestep in torch.as_tensor(timesteps).flatten().tolist()]
        return self._native.noised(original_samples, noise, levels)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` in the argument order of flow-matching schedulers."""
        return self.add_noise(sample, noise, timestep)
