"""GLASSScheduler: `flow.sample` turned inside out for the loop of a diffusers pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from . import natives
from .flow.noise import NoiseLevel
from .flow.solver import Block, InnerGrid, Solver
from .flow.state import InnerState, advance, correct, leave, moved, network_input, start
from .flow.timetable import cut, timetable
from .flow.transition import Correlations, check_correlations, check_num_transitions
from .natives import Native, NativeGrid
from .randomness import Generators, NoiseSource

_OWN = ("num_transitions", "correlation", "solver_order", "corrector", "inner_grid")

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

    Raises:
        ValueError: if an option is none of the above, or the native scheduler has no GLASS counterpart.

    Reference:
        Holderrieth et al., GLASS Flows, arXiv:2509.25170.
    """

    order = 1
    init_noise_sigma = 1.0
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
    ) -> None:
        self._num_transitions = check_num_transitions(num_transitions)
        self._correlation: Correlations = check_correlations(correlation)
        self._solver = Solver(solver_order, corrector, inner_grid)
        self._options = {key: self.config[key] for key in _OWN}  # as given
        self._wrap(natives.build(native or {"_class_name": "FlowMatchEulerDiscreteScheduler"}))

        self.on_transition: TransitionHook | None = None
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(self._native.num_train_timesteps - 1, -1, -1)
        self.sigmas = torch.empty(0)
        self._levels: list[NoiseLevel] = []
        self._noise = NoiseSource()
        self._reset()

    # ---- construction ------------------------------------------------------------------------------------------------

    def _wrap(self, scheduler: Any) -> None:
        """Read this native scheduler from now on, its config visible beside our own as hosts expect it."""
        self._native = Native(scheduler)
        keys = {k: v for k, v in scheduler.config.items() if not k.startswith("_") and k not in ("native", "glass")}
        native = {"_class_name": self._native.name, **keys}
        own = {key: repr(value) if callable(value) else value for key, value in self._options.items()}  # JSON
        # native keys win where the names meet (solver_order of DPM++), so that they survive the way back
        self.register_to_config(**{**own, **keys}, native=native, glass=own, _class_name="GLASSScheduler")

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
        if not hasattr(config, "items"):
            raise TypeError(
                f"config: expected a scheduler's config, got {type(config).__name__}: pass pipe.scheduler.config, "
                "or use GLASSScheduler.from_pretrained for a path"
            )
        if config.get("_class_name") == cls.__name__:
            native, own = dict(config["native"]), dict(config["glass"])
        else:
            native, own = {**config, "_class_name": natives.class_name(config)}, {}
        own |= {key: options.pop(key) for key in _OWN if key in options}
        unknown = [key for key in options if key not in natives.parameters(native["_class_name"])]
        if unknown:
            raise TypeError(
                f"from_config: unknown option {', '.join(unknown)}; GLASSScheduler takes {', '.join(_OWN)} "
                f"and the keys of {native['_class_name']}"
            )
        scheduler = cls(native | options, **own)
        return (scheduler, {}) if return_unused_kwargs else scheduler

    @classmethod
    def from_scheduler(cls, scheduler: Any, **options: Any) -> GLASSScheduler:
        """Build the GLASS counterpart of a scheduler object, exactly as it stands; the object itself is left alone.

        Args:
            scheduler: `pipe.scheduler`, native or a GLASSScheduler.
            options: Options of `GLASSScheduler` (which win over those of a GLASSScheduler).
        """
        is_glass = isinstance(scheduler, cls)
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
        """Copy the scheduler; the copy draws an independent stream of noise and has no hook."""
        new = object.__new__(type(self))
        new.__dict__ = copy.deepcopy({**self.__dict__, "on_transition": None}, memo)
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
        grid = self._native.grid(num_inference_steps, device, sigmas=sigmas, mu=mu, timesteps=timesteps)
        self._reset()
        self._grid = grid
        self._plan = self._timetable(grid.levels)
        self._levels = [step.level for block in self._plan for step in block.steps]
        self.num_inference_steps = len(grid.timesteps)
        self.timesteps, self.sigmas = self._host_view(grid)

    def _timetable(self, levels: Sequence[NoiseLevel]) -> list[Block]:
        return timetable(
            levels,
            self._num_transitions,
            schedule=self._native.schedule,
            correlation=self._correlation,
            solver=self._solver,
        )

    @property
    def _on_native_grid(self) -> bool:
        return self._correlation == "ddpm" and self._solver.grid == "time"

    def _host_view(self, grid: NativeGrid) -> tuple[Tensor, Tensor]:
        """Return `timesteps` (N,) and `sigmas` (N + 1,) of the network calls as the host names them."""
        if self._on_native_grid:
            return grid.timesteps, grid.sigmas
        return self._native.labels(self._levels, grid), self._native.sigmas([*self._levels, grid.levels[-1]])

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say where in `timesteps` the run begins (img2img)."""
        self._begin_index = begin_index

    @property
    def begin_index(self) -> int | None:
        """Where in `timesteps` the run begins, if the pipeline said so."""
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
        self._calls: list[tuple[int, Block, int]] = []
        self._progress: _Progress | None = None
        self._noise.reset()

    def _start(self, timestep: Any, sample: Tensor, generator: Generators | None) -> _Progress:
        """Begin a run: find its first call, cut the timetable to what remains, seed the noise."""
        if self.num_inference_steps is None:
            raise ValueError("step: no timetable yet: call set_timesteps first")
        begin = self._find(timestep) if self._begin_index is None else self._begin_index
        blocks = self._remaining(begin)
        offset = len(self._grid.timesteps) - sum(len(block.steps) for block in blocks)
        flat = [(k, block, i) for k, block in enumerate(blocks) for i in range(len(block.steps))]
        self._calls = [flat[0]] * offset + flat  # so that calls and timesteps share their index
        self._noise.begin(sample, generator)
        return _Progress(begin, start(sample.float(), blocks[0]), None)

    def _find(self, timestep: Any) -> int:
        found = (self.timesteps == torch.as_tensor(timestep).to(self.timesteps)).nonzero()
        if not len(found):
            raise ValueError(f"step: timestep {timestep} is not in scheduler.timesteps: set_timesteps was called since")
        return int(found[0])

    def _remaining(self, begin: int) -> list[Block]:
        """Return the transitions of a run from call `begin` on: laid anew, or cut where the host holds the times."""
        if begin > 0 and self._on_native_grid:
            return self._timetable(self._grid.levels[begin:])
        return cut(self._plan, begin, self._solver)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> GLASSSchedulerOutput | tuple[Tensor, Tensor]:
        """Take one inner step, and where it ends a transition, the transition.

        Args:
            model_output: What the network predicted for `sample`, shape (N, *event).
            timestep: The entry of `timesteps` it was told; read in the first step of a run only.
            sample: The network's input, shape (N, *event); edits made to it since the last step are carried along.
            generator: Source of the noise, or a list of one per row; see the class for the default.
            return_dict: Return a `GLASSSchedulerOutput`; else the tuple (prev_sample, pred_original_sample).

        Raises:
            ValueError: before `set_timesteps`, and after the last timestep of a run.
        """
        progress = self._progress or self._start(timestep, sample, generator)
        if progress.next_call == len(self.timesteps):
            raise ValueError("step: the run has ended: call set_timesteps to begin another")
        k, block, i = self._calls[progress.next_call]
        inner_step, x, state = block.steps[i], sample.float(), progress.state
        if progress.returned is not None:
            state = moved(inner_step, state, x - progress.returned.float())
        denoised = self._native.denoised(model_output.float(), x, inner_step.level)
        state = correct(inner_step, state, denoised)

        if i == 0:
            ancestors = self.on_transition(k, sample, denoised) if self.on_transition else None
            if ancestors is not None:
                state, denoised = state.select(ancestors), denoised[ancestors]
            if k > 0:
                state = replace(state, innovation=self._noise.draw(x, generator))
        state = advance(inner_step, state, denoised)
        if i + 1 < len(block.steps):
            previous = network_input(block.steps[i + 1], state)
        else:
            previous, state = leave(block, state)

        previous = previous.to(sample.dtype)
        self._progress = _Progress(progress.next_call + 1, state, previous.clone())
        denoised = denoised.to(sample.dtype, copy=True)
        return GLASSSchedulerOutput(previous, denoised) if return_dict else (previous, denoised)

    # ---- noising, for img2img and inpainting -------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample as it is: network inputs need no scaling."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return α_t z + σ_t ε at host timesteps, shape (N,) or scalar; z and ε of shape (N, *event)."""
        levels = [self._noising_level(timestep) for timestep in torch.as_tensor(timesteps).flatten()]
        alpha, sigma = (
            torch.tensor([getattr(level, name) for level in levels], dtype=torch.float32).to(original_samples)
            for name in ("alpha", "sigma")
        )
        shape = (-1, *[1] * (original_samples.ndim - 1))
        return alpha.view(shape) * original_samples + sigma.view(shape) * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` in the argument order of flow-matching schedulers."""
        return self.add_noise(sample, noise, timestep)

    def _noising_level(self, timestep: Tensor) -> NoiseLevel:
        """Noise level the host means: that of the run's next call, else of its first, else of the timestep itself."""
        if self._begin_index is not None:
            return self._levels[self._begin_index if self.step_index is None else self.step_index]
        found = (self.timesteps.cpu() == timestep.cpu()).nonzero() if self._levels else []
        return self._levels[int(found[0])] if len(found) else self._native.level_at(float(timestep))
