"""One call of a pipeline with K particles a prompt: `PipelineRun`.

For the time of the call the run owns what it replaces: the pipeline's scheduler, the methods by
which its networks are called, its decoder, its progress bar and `prepare_latents`. A pipeline is in
one run at a time; pipelines that share components may be in several.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Literal, NamedTuple, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..scheduler.glass import GLASSScheduler
from ..scheduler.hooks import Boundary, LookAhead, NetworkCall, TransitionHook
from .batch import (
    completing_rows,
    copies_of_rows,
    generator_per_particle,
    gives_fewer_rows,
    gives_frames_to,
    gives_one_image,
    lay_out,
    repeating_image,
)
from .decode import (
    ONE_AT_A_TIME,
    Decode,
    PipelineCall,
    decoder,
    gives_frames_as_rows,
    mixing_rows,
    upcast_where_it_overflows,
)
from .inpainting import KeptRegion, crops_to_mask
from .ledger import Ledger
from .microbatch import (
    DECODERS,
    NETWORKS,
    Living,
    MicroBatches,
    check_no_state,
    decoding_in_micro_batches,
    entry,
    modules,
    naming_batch_size,
    networks_in_micro_batches,
    of_living,
    within,
)
from .outputs import as_arrays, channels_last
from .patch import Method, apart, current, is_current, replaced
from .refusals import UnsteerablePipeline, check_steerable, has_safety_checker
from .team import ALONE, Team

_SIZES = ("height", "width", "num_frames")
_CALLBACKS = {"callback_on_step_end", "callback"}
_OBSERVERS = ("on_boundary", "on_denoised")

_in_a_run: WeakSet[Any] = WeakSet()
_lock = threading.Lock()


class Drawn(NamedTuple):
    """What a run drew.

    Args:
        samples: The particles' samples in the form of the pipeline's `output_type`: its own, or
            where it was interrupted, what it had last predicted, unless a safety checker judges.
            Those of particles that rest are copies of others.
        outputs: The pipeline's output.
        latents: What the samples were decoded from: the latents that left the scheduler's last
            step, or the last denoised predictions; None if no step was taken.
        interrupted: Whether `pipe._interrupt` ended the run before its last step.
    """

    samples: Any
    outputs: Any
    latents: Tensor | None
    interrupted: bool


class PipelineRun:
    """A call of a pipeline, laid out with K particles for each prompt.

    Args:
        pipe: The pipeline; the call replaces methods and the scheduler on it, and puts them back.
        given: The keyword arguments that the user called it with.
        num_particles: K.
        batches: How many particles are worked on at a time.
        ledger: Where network calls and seconds are counted.
        shrinks: Whether the hook will let particles rest.
        team: The processes that share the particles.

    Attributes:
        prompts: The prompt of each particle, prompt-major; None where only embeddings were given.

    Raises:
        ValueError: if the pipeline cannot be steered, or its particles not be laid out.
    """

    def __init__(
        self,
        pipe: Any,
        given: Mapping[str, Any],
        num_particles: int,
        batches: MicroBatches,
        ledger: Ledger,
        *,
        shrinks: bool = False,
        team: Team = ALONE,
    ) -> None:
        check_steerable(pipe)
        self.pipe = pipe
        self._given = given
        self._num_particles = num_particles
        self._batches = batches
        self._ledger = ledger
        self._arguments, self.prompts = lay_out(pipe, given, num_particles)
        self._living = Living(len(self.prompts), shrinks, team=team)
        check_no_state(pipe, given, batches.network, self._living)
        if team.size > 1:
            _check_alone(pipe)
        self._sizes: dict[str, int] = {}
        self._bar: Any = None
        self._kept = KeptRegion()

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        pipe = self.pipe
        return torch.device(pipe._execution_device)

    def decoder(self, preview_vae: Any = None) -> Decode:
        """Return what decodes latents as the pipeline does; to be called once the run is on.

        Args:
            preview_vae: An autoencoder that decodes in the place of the pipeline's.

        Raises:
            ValueError: if the pipeline is of no known family.
        """
        return decoder(PipelineCall(self.pipe, self._given, self._sizes, preview_vae))

    def held_for_gradients(self, preview_vae: Any = None) -> AbstractContextManager[None]:
        """Return a context in which what decodes stays in one dtype, backwards included."""
        return upcast_where_it_overflows(PipelineCall(self.pipe, preview_vae=preview_vae).vae)

    def work_on(self, living: Tensor | None, num_frames: int = 1) -> None:
        """Let networks and decoders see some particles alone from now on, all for None.

        Args:
            living: The particles, increasing.
            num_frames: Frames of each, if it is a video.

        Raises:
            ValueError: if the networks keep something of all rows between calls.
        """
        self._living.num_frames = num_frames
        self._living.chosen = living
        if living is not None and not self._living.shrinks:  # which nobody had announced
            self._living.shrinks = True
            check_no_state(self.pipe, self._given, self._batches.network, self._living)

    def show(self, **values: str) -> None:
        """Show values on the pipeline's own progress bar."""
        if self._bar is not None:
            self._bar.set_postfix(**values)

    def __call__(
        self,
        scheduler: GLASSScheduler,
        hook: TransitionHook,
        output_type: Literal["np", "latent"],
        decode: Decode | None = None,
    ) -> Drawn:
        """Run the pipeline with a scheduler in the place of its own.

        Args:
            scheduler: The scheduler; it is this run's alone.
            hook: Acts at boundaries; it sees one row for each particle.
            output_type: That of the pipeline.
            decode: Decodes the latents of an interrupted run where the pipeline is of no known
                family; None for nobody.

        Raises:
            RuntimeError: if the pipeline is in another run, which goes on undisturbed.
        """
        rows = _RowsHook(self, hook)
        with _claimed(self), ExitStack() as stack:
            stack.enter_context(_scheduler_replaced(self.pipe, scheduler, rows))
            self._replace_methods(stack)
            stack.enter_context(self._kept.watched(self.pipe, scheduler, self))
            of_pipe = "pil" if crops_to_mask(self._given) and output_type == "np" else output_type
            arguments = {**self._arguments, "output_type": of_pipe}
            for name in _CALLBACKS & arguments.keys():
                arguments[name] = apart(arguments[name])
            if "generator" in arguments:
                arguments["generator"] = generator_per_particle(
                    arguments["generator"], len(self.prompts), self._num_particles
                )
            with current(self):
                outputs = self.pipe(**arguments)
        self._ledger.network_calls = rows.num_rows
        interrupted = bool(getattr(self.pipe, "_interrupt", False)) and not rows.complete
        if not rows.num_calls and not interrupted:
            raise UnsteerablePipeline(self.pipe, "it never stepped its scheduler")
        if rows.looked_ahead and not rows.complete and not interrupted:
            raise UnsteerablePipeline(
                self.pipe,
                "it leaves its loop before the last of scheduler.timesteps, which look_ahead makes "
                "longer: leave look_ahead out",
            )
        checked = has_safety_checker(self.pipe) and output_type == "np"
        own = as_arrays(outputs[0])
        if not interrupted or rows.denoised is None or checked:  # nothing goes past a checker
            return Drawn(own, outputs, rows.latents, interrupted)
        denoised = self.with_kept_region(rows.denoised)
        samples = self._predicted(denoised, own, output_type, decode)
        return Drawn(samples, outputs, denoised, interrupted)

    def with_kept_region(self, latents: Tensor) -> Tensor:
        """Return clean latents of all particles with what inpainting keeps of an image put back."""
        return self._kept.put_back(self.pipe, latents)

    @torch.no_grad()
    def as_output(self, latents: Tensor, own: Any, output_type: str, decode: Decode | None) -> Any:
        """Return latents in the form of a pipeline's own samples, or these where that is not known.

        Args:
            latents: Clean latents, shape (N, *event).
            own: Samples that the pipeline put out.
            output_type: "latent" or "np".
            decode: Decodes where the pipeline is of no known family; None for nobody.
        """
        if output_type == "latent":
            return latents
        with suppress(ValueError):  # of no known family
            decode = self.decoder()
        if decode is None:
            return own
        with naming_batch_size("decode"):
            parts = latents.split(self._batches.decode or len(latents))
            return channels_last(torch.cat([decode(part) for part in parts]), own)

    def _predicted(self, denoised: Tensor, own: Any, output_type: str, decode: Any) -> Any:
        """Return denoised predictions as `as_output` does; those that rest are not decoded."""
        if output_type == "latent":
            return denoised
        living = denoised[self._living.particles.to(denoised.device)]
        samples = self.as_output(living, own, output_type, decode)
        return samples if samples is own else samples[self._living.places().numpy()]

    def _replace_methods(self, stack: ExitStack) -> None:
        """Replace, for this run, the methods it has to be in the way of."""
        pipe, batches, number = self.pipe, self._batches, len(self.prompts)
        living, mixing = self._living, mixing_rows(self.pipe)

        def networks(network: torch.nn.Module, forward: Method) -> Method:
            forward = networks_in_micro_batches(
                network, forward, number, batches.network, living, gives_frames_to(pipe, network)
            )
            if gives_fewer_rows(pipe):
                forward = completing_rows(forward)
            forward = within(lambda: naming_batch_size("network"), forward)
            return within(lambda: self._ledger.timing("network"), forward)

        def decoders(module: torch.nn.Module, decode: Method) -> Method:
            size = 1 if type(module).__name__ in ONE_AT_A_TIME else batches.decode
            some = None if gives_frames_as_rows(pipe) else living
            decode = decoding_in_micro_batches(module, decode, number, size, some)
            return within(lambda: naming_batch_size("decode"), decode)

        for network in modules(pipe, NETWORKS):
            stack.enter_context(replaced(network, entry(network), self, partial(networks, network)))
        for module in modules(pipe, DECODERS):
            stack.enter_context(replaced(module, "decode", self, partial(decoders, module)))
        if mixing is not None:
            some = partial(of_living, living=living)
            stack.enter_context(replaced(pipe, mixing, self, some))
        if gives_one_image(pipe):
            stack.enter_context(replaced(pipe, "encode_prompt", self, repeating_image))
        if hasattr(pipe, "check_inputs"):  # a call begins with it
            own, others = self._admitting_once, self.refuse
            stack.enter_context(replaced(pipe, "check_inputs", self, own, for_others=others))
        if hasattr(pipe, "progress_bar"):
            stack.enter_context(replaced(pipe, "progress_bar", self, self._watching))
        stack.enter_context(settled_sizes(pipe, self, self._sizes))

    def _admitting_once(self, check_inputs: Method) -> Method:
        """Return a `check_inputs` for the call of this run, not for calls from within it."""
        begun = False

        def checking(*args: Any, **kwargs: Any) -> Any:
            nonlocal begun
            if begun:
                self.refuse()
            begun = True
            return check_inputs(*args, **kwargs)

        return checking

    def refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse another call of the pipeline while this one is under way."""
        raise RuntimeError(
            f"{type(self.pipe).__name__}: a steered call of this pipeline is under way, in another "
            "thread or around this one: give each call a pipeline of its own, "
            "Pipeline(**pipe.components), which shares the networks"
        )

    def _watching(self, progress_bar: Method) -> Method:
        """Return a `progress_bar` whose bars this run may write on."""

        def making(*args: Any, **kwargs: Any) -> Any:
            if self._living.team.rank:  # the first process has one for all
                self._bar = tqdm(*args, **kwargs, disable=True)
            else:
                self._bar = progress_bar(*args, **kwargs)
            return self._bar

        return making


@contextmanager
def settled_sizes(pipe: Any, run: Any, sizes: dict[str, int]) -> Iterator[None]:
    """Fill `sizes` with those that a pipeline prepares its latents for, within a block.

    Many pipelines round the sizes they are given, or take them from an image (FLUX Kontext, Fill,
    Qwen-Image-Edit).

    Args:
        pipe: The pipeline.
        run: The run whose call it is.
        sizes: `height`, `width` and `num_frames`, as far as there are such.
    """
    if not hasattr(pipe, "prepare_latents"):
        yield
        return

    def recording(prepare: Method) -> Method:
        names = list(inspect.signature(prepare).parameters)

        def preparing(*args: Any, **kwargs: Any) -> Any:
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            sizes.update({name: arguments[name] for name in _SIZES if arguments.get(name)})
            return prepare(*args, **kwargs)

        return preparing

    with replaced(pipe, "prepare_latents", run, recording):
        yield


class _RowsHook(TransitionHook):
    """The hook of a run: it stands between the rows of the pipeline and the particles.

    Args:
        run: The run.
        inner: The hook that sees particles.

    Attributes:
        moves: The rows that went on at each boundary so far.
        latents: The particles' latents after the last call.
        denoised: Their denoised predictions of the last call.
        num_calls: Number of network calls so far.
        num_rows: Rows of living particles in them.
        complete: Whether the last call of the run has been made.
        looked_ahead: Whether a call belonged to an excursion.
    """

    def __init__(self, run: PipelineRun, inner: TransitionHook) -> None:
        self.run = run
        self.inner = inner
        self.number = len(run.prompts)
        self.copies = 1
        self.moves: list[Tensor | None] = []
        self.latents: Tensor | None = None
        self.denoised: Tensor | None = None
        self.num_calls = self.num_rows = 0
        self._rows = self._next_rows = self.number
        self.complete = False
        self.looked_ahead = False

    def admit(self) -> None:
        if not is_current(self.run):
            self.run.refuse()

    def begins(self, seeds: list[int]) -> None:
        self.inner.begins(seeds[: self.number])

    def at_boundary(self, at: Boundary, x_t: Tensor, z: Tensor) -> Tensor | None:
        if at.index == 0:
            self._begin(x_t)
        with current(None):
            particles = self.inner.at_boundary(at, x_t[: self.number], z[: self.number])
            living = self.inner.living()
        self.run.work_on(living, x_t.shape[2] if x_t.ndim == 5 else 1)
        self._next_rows = self.number if living is None else len(living)
        rows = None
        if particles is not None:
            copies = [particles + copy * self.number for copy in range(self.copies)]
            rows = torch.cat(copies).to(z.device)
        self.moves.append(rows)
        return rows

    def look_ahead(self, at: Boundary) -> LookAhead | None:
        return self.inner.look_ahead(at)

    def arrived(self, at: Boundary, z: Tensor) -> None:
        with current(None):
            self.inner.arrived(at, self.run.with_kept_region(z[: self.number]))

    def shift(self, at: Boundary, z: Tensor) -> Tensor | None:
        with current(None):
            mean = self.inner.shift(at, z[: self.number])
        return None if mean is None else torch.cat([mean] * self.copies)

    def drew(self, at: Boundary, noise: Tensor) -> None:
        with current(None):
            self.inner.drew(at, noise[: self.number])

    def _begin(self, x_t: Tensor) -> None:
        pipe = self.run.pipe
        if self.moves:
            raise UnsteerablePipeline(pipe, "it runs its scheduler more than once")
        copies = copies_of_rows(x_t, self.number)
        if copies is None:
            raise ValueError(
                f"the pipeline runs {len(x_t)} rows, expected prompts × num_particles = "
                f"{self.number}: the way {type(pipe).__name__} lays out its batch is not supported"
            )
        self.copies = copies

    def after_call(self, call: NetworkCall, x_next: Tensor) -> None:
        self.latents = x_next[: self.number]
        self.num_calls += 1
        self.num_rows += self._rows
        self._rows = self._next_rows  # the call at a boundary is that of those before it
        self.complete = call.index + 1 == call.total
        self.looked_ahead |= call.excursion is not None

    def after_prediction(self, call: NetworkCall, z: Tensor) -> None:
        self.denoised = z[: self.number]

    def for_copy(self) -> TransitionHook:
        return _FollowingHook(self)


class _FollowingHook(TransitionHook):
    """The hook of a copy of the scheduler: its rows go where those of the original have gone."""

    def __init__(self, leader: _RowsHook) -> None:
        self.leader = leader

    def look_ahead(self, at: Boundary) -> LookAhead | None:
        return self.leader.look_ahead(at)

    def at_boundary(self, at: Boundary, x_t: Tensor, z: Tensor) -> Tensor | None:
        if at.index >= len(self.leader.moves):
            raise UnsteerablePipeline(self.leader.run.pipe, "a copy of its scheduler steps first")
        return self.leader.moves[at.index]


def _check_alone(pipe: Any) -> None:
    """Refuse networks that share a sample among processes, as diffusers' context parallelism does.

    Raises:
        ValueError: if there is one.
    """
    for network in modules(pipe, NETWORKS):
        if getattr(network, "_parallel_config", None) is not None:
            raise ValueError(
                f"distributed: expected False for {type(pipe).__name__}, whose "
                f"{type(network).__name__} shares each sample among the processes "
                "(enable_parallelism): processes share either samples or the particles"
            )


@contextmanager
def _claimed(run: PipelineRun) -> Iterator[None]:
    """Hold the pipeline of a run for it alone.

    Raises:
        RuntimeError: if another run holds it.
    """
    with _lock:
        if run.pipe in _in_a_run:
            run.refuse()
        _in_a_run.add(run.pipe)
    try:
        yield
    finally:
        with _lock:
            _in_a_run.discard(run.pipe)


@contextmanager
def _scheduler_replaced(pipe: Any, scheduler: GLASSScheduler, hook: _RowsHook) -> Iterator[None]:
    """Put a scheduler with a hook in the place of a pipeline's own, and that back.

    A scheduler that somebody put there since is left there.
    """
    native = pipe.scheduler
    scheduler.hook = hook
    for name in _OBSERVERS:
        setattr(scheduler, name, apart(getattr(scheduler, name)))
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        scheduler.hook = None
        if pipe.scheduler is scheduler:
            pipe.scheduler = native
