"""GLASSScheduler: `flow.sample` turned inside out for the loop of a diffusers pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from ..flow.solver import InnerGrid, Solver
from ..flow.state import InnerState, inner_step, start
from ..flow.transition import Correlations, check_correlations
from ..signatures import passing_on
from . import config as configs
from .calls import Call, FirstTransition, Timetable, Transitions
from .hooks import Boundary, NetworkCall, TransitionHook
from .native import Native
from .noise_source import Generators, NoiseSource, check_initial_noise
from .progress import Departure, Progress
from .supported import FLOW_MATCH_EULER, NATIVE_READS, SUPPORTED

if TYPE_CHECKING:
    from typing_extensions import Self

_OWN = (
    "num_transitions",
    "correlation",
    "solver_order",
    "corrector",
    "inner_grid",
    "first_transition",
    "noise_scale",
)

_FOR_HOOKS = (-1,)
"""The stream of random numbers that hooks draw."""

BoundaryObserver = Callable[[Boundary, Tensor, Tensor], Any]
CallObserver = Callable[[NetworkCall, Tensor], Any]


@dataclass
class GLASSSchedulerOutput(BaseOutput):
    """Output of `GLASSScheduler.step`.

    Args:
        prev_sample: The next network input, shape and dtype of `sample`.
        pred_original_sample: The denoised prediction ẑ of this call, same shape and dtype.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class GLASSScheduler(SchedulerMixin, ConfigMixin):
    """Sample a model by GLASS transitions, at the network calls and times of its own scheduler.

        pipe.scheduler = GLASSScheduler.from_config(pipe.scheduler.config)

    `num_inference_steps` counts network calls, as with any scheduler of order 1; they are split
    into `num_transitions` contiguous stochastic transitions, each of them an ODE. With one
    transition this is the native ODE sampler, with as many transitions as calls DDPM ancestral
    sampling.

    The noise between transitions comes from the generator given to `step`, else from the one given
    to `set_generator`, else from one generator per row, seeded by that row's initial latents:
    `pipe(generator=g)` reproduces the images of every pipeline, also of those that pass no
    generator to `step`.

    Args:
        native: Config of the native scheduler with its `_class_name`; `from_config` and
            `from_scheduler` fill it in.
        num_transitions: Number K of transitions, clipped to the number of calls.
        correlation: Noise correlation ρ between the states of a transition: "ddpm" or a number in
            [-1, 1], a list with one per transition (the first does not use its own), or a function
            (t, t′) ↦ ρ, which a saved config can only name.
        solver_order: 1 for Euler, 2 for the two-step predictor.
        corrector: Whether order 2 corrects each step once its end has been evaluated, at no further
            call.
        inner_grid: "time" (calls on the native grid) or "condot" (the paper's uniform s).
        first_transition: "ode" starts from the initial latents as they are, the ODE; "posterior"
            draws noise there too, so that one transition draws from p(z | initial latents), of
            which a noised image (img2img) has many.
        noise_scale: Standard deviation of the initial noise; 1 but for PRX-Pixel, whose
            `pipe.config` names it.

    Attributes:
        on_boundary: A function that is told every boundary, `on_boundary(at, x_t, z)`: the start of
            a transition, the latents there and their denoised prediction; None for nobody.
        on_denoised: A function that is told every network call, `on_denoised(call, z)`, and the
            denoised prediction it gave; None for nobody.
        hook: A `TransitionHook`, which may also choose the rows that go on; None for none.

    Raises:
        ValueError: if an option is none of the above, or the native scheduler has no GLASS
            counterpart.

    Reference:
        Holderrieth et al., GLASS Flows, arXiv:2509.25170.
    """

    order = 1
    init_noise_sigma = 1.0
    model_outputs, last_sample = (), None  # which ChronoEdit looks through for frames to drop
    _compatibles: ClassVar = list(SUPPORTED)

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
        self._wrap(configs.build(native or {"_class_name": FLOW_MATCH_EULER}))

        self.on_boundary: BoundaryObserver | None = None
        self.on_denoised: CallObserver | None = None
        self.hook: TransitionHook | None = None
        self.num_inference_steps: int | None = None
        self._timetable: Timetable | None = None
        self._noise = NoiseSource()
        self._in_hook = False
        self._show_training_grid()
        self._reset()

    # ---- construction ----------------------------------------------------------------------------

    def _wrap(self, scheduler: Any) -> None:
        """Read this native scheduler from now on, its config visible beside our own."""
        self._native = Native(scheduler, self._options["noise_scale"])
        native = configs.written(scheduler)
        own = {key: configs.plain(value) for key, value in self._options.items()}
        # native keys win where the names meet (solver_order of DPM++): they survive the way back
        visible = {**own, **native, "_class_name": type(self).__name__}
        if "_use_default_values" in {**self.config, **scheduler.config}:
            # those that other classes may set anew
            visible["_use_default_values"] = list(scheduler.config.get("_use_default_values", ()))
        self.register_to_config(**visible, native=native, glass=own)

    def _show_training_grid(self) -> None:
        """Show what the native scheduler shows before `set_timesteps`, for training."""
        native = self._native.scheduler
        self.timesteps = torch.arange(self._native.num_train_timesteps - 1, -1, -1)
        if getattr(native, "timesteps", None) is not None:  # PNDM's
            self.timesteps = native.timesteps.clone()
        if hasattr(native, "sigmas"):
            self.sigmas = native.sigmas.clone()

    @property
    def config(self) -> configs.GLASSConfig:
        """The native keys beside our own; a native's `from_config` takes what is its own."""
        if not isinstance(self._internal_dict, configs.GLASSConfig):  # registered, or mended
            self._internal_dict = configs.GLASSConfig(self._internal_dict)
        return self._internal_dict

    def to_json_file(self, json_file_path: str | PathLike[str]) -> None:
        """Write the config, from which a native's `from_pretrained` takes what is its own."""
        text = configs.written_for_natives(self.to_json_string(), self.config)
        Path(json_file_path).write_text(text, encoding="utf-8")

    @property
    def compatibles(self) -> list[type]:
        """The classes that the native scheduler may be exchanged for."""
        return self._native.scheduler.compatibles

    def __getattr__(self, name: str) -> Any:
        """Read what a native scheduler shows of its tables, for guidance and training."""
        if name not in NATIVE_READS or "_native" not in self.__dict__:
            return super().__getattr__(name)
        native = self._native.scheduler
        try:
            return getattr(native, name)
        except AttributeError:
            raise AttributeError(
                f"'{type(self).__name__}' object has no attribute '{name}': its native "
                f"{type(native).__name__} has none"
            ) from None

    @overload  # type: ignore[override]
    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: Literal[False] = False, **options: Any
    ) -> Self: ...

    @overload
    @classmethod
    def from_config(
        cls, config: Any = None, *, return_unused_kwargs: Literal[True], **options: Any
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **options: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Build the GLASS counterpart of the scheduler a config belongs to.

        Args:
            config: `pipe.scheduler.config`, or the config of a GLASSScheduler.
            return_unused_kwargs: Also return the options that were not used (none: unknown ones are
                an error).
            options: Options of `GLASSScheduler`, and native keys to override (`shift=3.0`).

        Raises:
            TypeError: if an option is known neither to GLASSScheduler nor to the native scheduler.
            ValueError: if the native class is not supported or cannot be told from the config.
        """
        native, own = configs.parts(config, options, _OWN)
        scheduler = cls(native=native, **own)
        if "_diffusers_version" in config:
            scheduler.register_to_config(_diffusers_version=config["_diffusers_version"])
        return (scheduler, {}) if return_unused_kwargs else scheduler

    @classmethod
    def from_scheduler(cls, scheduler: Any, **options: Any) -> Self:
        """Build the GLASS counterpart of a scheduler object, exactly as it stands.

        The object itself is left alone. Of a GLASSScheduler the generator and the observers are
        taken over, not the hook, which belongs to a run.

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
        new._wrap(configs.without_run(native))
        new._show_training_grid()
        if is_glass:
            new._noise.generator = scheduler._noise.generator
            new.on_boundary, new.on_denoised = scheduler.on_boundary, scheduler.on_denoised
        return new

    def set_generator(self, generator: Generators | None) -> None:
        """Draw the noise of later runs from this source.

        Args:
            generator: A generator, or a list of one per row; None seeds one per row by its latents.
        """
        self._noise.generator = generator

    def __deepcopy__(self, memo: dict[int, Any]) -> GLASSScheduler:
        """Copy the scheduler.

        The copy draws an independent stream of noise, has the hook that the hook names for copies,
        and tells no observer.
        """
        new = memo[id(self)] = object.__new__(type(self))
        alone = {"hook": None, "on_boundary": None, "on_denoised": None, "_in_hook": False}
        new.__dict__ = copy.deepcopy({**self.__dict__, **alone}, memo)
        new.hook = None if self.hook is None else self.hook.for_copy()
        return new

    # ---- the timetable ---------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Lay the network calls of the next run; the native scheduler computes their grid.

        Args:
            num_inference_steps: Number of network calls.
            device: Device of `timesteps`.
            sigmas: Noise levels before shifting, where the native scheduler takes them.
            mu: Shift of resolution-dependent natives.
            timesteps: Custom timesteps, where the native scheduler takes them.

        Raises:
            ValueError: if the native scheduler does not take these arguments.
        """
        self._admit("set_timesteps")
        given = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps}
        if (native := configs.current(self.config)) != self.config["native"]:
            self._wrap(configs.build(native))
        looks = (self.hook or TransitionHook()).look_ahead
        laid = Timetable(
            self._native, self._transitions, num_inference_steps, device, looks, **given
        )
        self._timetable = laid
        self._reset()
        self.timesteps, self.sigmas = laid.timesteps, laid.sigmas
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
        return None if self._run is None else self._run.index

    def __len__(self) -> int:
        return self._native.num_train_timesteps

    # ---- the run ---------------------------------------------------------------------------------

    def _reset(self) -> None:
        self._begin_index: int | None = None
        self._run: Progress | None = None
        self._noise.reset()

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
            timestep: The entry of `timesteps` it was told, which is the one due; on an accelerator
                it is read in the first step of a run only.
            sample: The network's input, shape (N, *event); edits made to it since the last step are
                carried along.
            generator: Source of the noise, or a list of one per row; see the class for the default.
            return_dict: Return a `GLASSSchedulerOutput`; else the tuple (prev_sample,
                pred_original_sample).
            per_token_timesteps: Given by LTX-Condition, which negates its velocity and itself puts
                back tokens not due.
            eta, use_clipped_model_output, prev_timestep: Sent by `DDIMPipeline` and unCLIP priors;
                DDIM's η is `num_transitions` here, steps are along the clipped prediction and to
                the next timestep.

        Raises:
            ValueError: before `set_timesteps`, after the last timestep of a run, for a timestep
                that is not due, where a sample has no rows or its shape changed, and for an `eta`
                other than 0.
        """
        self._admit("step")
        if eta:
            raise ValueError(
                f"eta: expected 0, got {eta}: num_transitions sets how stochastic the sampler is"
            )
        run = self._run or self._begin(timestep, sample, generator)
        if run.has_ended:
            raise ValueError("step: the run has ended: call set_timesteps to begin another")
        self._timetable.check_due(timestep, run.index)  # type: ignore[union-attr]
        call, x, state = run.call, sample.float(), run.state_at(sample)
        output = model_output.float() if per_token_timesteps is None else -model_output.float()
        denoised = self._native.denoised(output, x, call.told.level)
        self._tell(call.told, sample, denoised)
        x_next, state, denoised, away = self._advance(run, state, sample, denoised, generator)
        if run.is_at_last_call:  # in units of the native sampler
            x_next = self._timetable.end_scale * x_next  # type: ignore[union-attr]
        x_next = x_next.to(sample.dtype)
        # a hook may hold what it was told: its memory is not written again
        progress = run.advanced(state, x_next, self.hook is None, away)
        self._run = progress.released() if progress.has_ended else progress
        if self.hook is not None:
            self.hook.after_call(call.told, progress.returned)  # type: ignore[arg-type]
        denoised = self._on_host_scale(denoised, sample.dtype)
        return GLASSSchedulerOutput(x_next, denoised) if return_dict else (x_next, denoised)

    def _advance(
        self,
        run: Progress,
        state: InnerState,
        sample: Tensor,
        denoised: Tensor,
        generator: Generators | None,
    ) -> tuple[Tensor, InnerState, Tensor, Departure | None]:
        """Take the inner step that is due: of an excursion, out of a boundary, or of the chain.

        Returns:
            The next network input, its state, ẑ of the rows that went on, and the boundary that the
            excursion under way has left from.
        """
        call, away = run.call, run.departure
        if away is not None:
            x_next, state = inner_step(call.block, call.i, state, denoised)
            if not call.is_last:
                return x_next, state, denoised, away
            self._arrived(away, x_next)
        elif call.excursions is not None:
            # the host may write into its latents, and the network into its output
            away = Departure(call, state, sample.clone(), denoised.clone())
        if away is not None and away.has_another:
            noise = self._noise.draw_aside(denoised)
            x_next, state = inner_step(away.excursion, 0, away.state, away.denoised, noise)
            return x_next, state, denoised, away.leaving()
        if away is not None:
            call, state, sample, denoised = away.call, away.state, away.sample, away.denoised
        rows = self._rows_that_go_on(call.told, sample, denoised)
        if rows is not None:
            state, denoised = state.select(rows), denoised[rows]
        noise = self._fresh_noise(call, denoised, generator) if call.draws else None
        x_next, state = inner_step(call.block, call.i, state, denoised, noise)
        if self.hook is not None:
            self.hook.after_prediction(call.told, self._on_host_scale(denoised, sample.dtype))
        return x_next, state, denoised, None

    def _begin(self, timestep: Any, sample: Tensor, generator: Generators | None) -> Progress:
        """Begin a run: find its first call, lay its transitions, seed its noise."""
        if self._timetable is None:
            raise ValueError("step: no timetable yet: call set_timesteps first")
        if sample.ndim == 0 or not len(sample):
            raise ValueError(
                "step: expected a sample with at least one row, got shape "
                f"{tuple(sample.shape)}: leave empty batches out"
            )
        if self._begin_index is None:
            self._begin_index = self._timetable.find(float(timestep))
        calls = self._timetable.calls(self._begin_index)
        block = calls[0].block
        check_initial_noise(sample, block.transition.t)
        self._noise.begin(sample, generator)
        if self._timetable.looks_ahead:
            self._noise.begin_aside(sample)
        if self.hook is not None:
            self.hook.begins(self._noise.seeds(sample, _FOR_HOOKS))
        return Progress(calls, self._begin_index, start(sample.float(), block), returned=None)

    def _tell(self, told: NetworkCall, sample: Tensor, denoised: Tensor) -> None:
        """Tell observers of a call."""
        if self.on_denoised is self.on_boundary is None:
            return
        with self._hooks_running():
            if self.on_denoised is not None:
                self.on_denoised(told, self._on_host_scale(denoised, sample.dtype).clone())
            if self.on_boundary is not None and told.boundary is not None:
                z = self._on_host_scale(denoised, sample.dtype).clone()
                self.on_boundary(told.boundary, sample, z)

    def _rows_that_go_on(
        self, told: NetworkCall, sample: Tensor, denoised: Tensor
    ) -> Tensor | None:
        """Return the rows that the hook lets go on from a boundary; None for all."""
        if self.hook is None or told.boundary is None:
            return None
        with self._hooks_running():
            return self.hook.at_boundary(told.boundary, sample, self._native.data_scale * denoised)

    def _arrived(self, away: Departure, x: Tensor) -> None:
        """Tell the hook of the end of an excursion, in units of the native sampler."""
        if self.hook is not None and away.call.told.boundary is not None:
            with self._hooks_running():
                z = self._timetable.end_scale * x  # type: ignore[union-attr]
                self.hook.arrived(away.call.told.boundary, z)

    def _fresh_noise(self, call: Call, denoised: Tensor, generator: Generators | None) -> Tensor:
        """Return the noise ε̄ of a transition, which the hook may shift where it matters."""
        noise, at = self._noise.draw(denoised, generator), call.told.boundary
        if self.hook is None or at is None or call.ends_in_prediction:
            return noise
        with self._hooks_running():
            mean = self.hook.shift(at, self._native.data_scale * denoised)
            noise = noise if mean is None else noise + mean.to(noise)
            self.hook.drew(at, noise)
        return noise

    def _on_host_scale(self, denoised: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ẑ in the host's units."""
        scale = self._native.data_scale
        return (denoised if scale == 1 else scale * denoised).to(dtype)

    def _admit(self, method: str) -> None:
        """Refuse a caller other than the run's own."""
        if self._in_hook:
            raise RuntimeError(
                f"{method}: called from a hook of the run under way: a hook, and a reward, must "
                "use a pipeline of its own"
            )
        if self.hook is not None:
            self.hook.admit()

    @contextmanager
    def _hooks_running(self) -> Iterator[None]:
        self._in_hook = True
        try:
            yield
        finally:
            self._in_hook = False

    # ---- noising, for img2img and inpainting -----------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample as it is: network inputs need no scaling.

        Raises:
            ValueError: for a number, which only a pipeline asks for that computes in σ coordinates
                of its own.
        """
        if sample.ndim == 0:
            raise ValueError(
                "scale_model_input: expected a sample, got a number: pipelines that scale their "
                "sigmas themselves (the latent upscaler) are not supported"
            )
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return α_t z + σ_t ε.

        Args:
            original_samples: z, shape (N, *event).
            noise: ε, same shape.
            timesteps: Host timesteps, shape (N,) or scalar.
        """
        index = self._begin_index if self.step_index is None else self.step_index
        level = self._native.level_at
        if self._timetable is not None:
            level = partial(self._timetable.level, index=index)
        levels = [level(timestep) for timestep in torch.as_tensor(timesteps).flatten().tolist()]
        noised = self._native.noised(original_samples, noise, levels)
        if self._run is None:
            self._noise.added(noise, noised)
        return noised

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` in the argument order of flow-matching schedulers."""
        return self.add_noise(sample, noise, timestep)


for _name in ("from_config", "from_scheduler"):
    _function: Any = vars(GLASSScheduler)[_name].__func__
    _function.__signature__ = passing_on(
        _function, GLASSScheduler.__init__, but=("native",), keep=_name == "from_config"
    )
