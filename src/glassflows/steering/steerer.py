"""Steerer: a pipeline, a reward and a strategy."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import fields, is_dataclass, replace
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from diffusers import FlowMatchEulerDiscreteScheduler

from ..host.batch import COUNTS
from ..host.decode import Decode, at_size, check_preview_vae
from ..host.ledger import Ledger
from ..host.microbatch import BATCH_SIZE_OPTIONS, MicroBatches
from ..host.refusals import check_counts_no_steps, check_steerable
from ..host.run import PipelineRun
from ..host.team import Distributed, Team, team_of
from ..scheduler.flow_match import GLASSFlowMatchScheduler
from ..scheduler.glass import GLASSScheduler
from ..scheduler.hooks import LookAhead
from ..signatures import call_if_there, passing_on
from .arguments import (
    Select,
    check_generator,
    check_not_options,
    check_prompt,
    take_wanted,
)
from .budget import affordable_calls, num_transitions, proposals
from .calibration import (
    Calibration,
    Unmoved,
    calibrate_from,
    check_particles,
    check_transitions,
    warn_if_few,
)
from .display import Live
from .ending import ended
from .feynman_kac import FeynmanKac, check_calibrates
from .population import Population
from .proposals import Twist
from .record import draws_by_default, recipe
from .result import SteeringResult
from .scorer import Reward, Scorer, check_reward, compares, load_reward
from .strategy import Strategy, check_strategy, check_whole, is_whole
from .trajectory import Recorder
from .widths import check_enough

if TYPE_CHECKING:
    from typing_extensions import Self


class _OfItsPipeline:
    """The signature of a steerer's calls, which has the keyword arguments of its pipeline."""

    def __get__(self, steerer: Steerer | None, cls: type) -> inspect.Signature:
        if steerer is None:  # that of the class is its constructor's
            raise AttributeError("__signature__")
        call = passing_on(steerer.__call__, steerer.pipe.__call__)
        shown = call.parameters.values()  # a pipeline draws one image, a steerer all particles
        return call.replace(
            parameters=[one.replace(default=None) if one.name in COUNTS else one for one in shown]
        )


class Steerer:
    """Draw K particles per prompt with GLASS transitions, and let a strategy choose who goes on.

    At the starts of transitions after the first, where the strategy asks for it, the denoised
    predictions (free: the network's first call there) are decoded and scored, and the strategy
    decides which particles go on.

    Args:
        pipe: Any pipeline whose scheduler has a GLASS counterpart. Its scheduler is replaced for
            the call and put back.
        reward: `reward(images, prompts)` gets float images (N, 3, H, W) in [0, 1], or videos (N,
            frames, 3, H, W), or waveforms (N, channels, samples), and one prompt per particle (None
            where only embeddings were given), and returns N scores, higher is better.
        strategy: Which particles go on: `FeynmanKac()`, `BestOfN()`, `BeamSearch()`, `Halving()`,
            or any object with the methods of `Strategy`.
        num_particles: K, particles per prompt.
        num_transitions: Number of transitions; None keeps that of a GLASSScheduler in the pipeline,
            else its default.
        decode: Turns latents, as the scheduler sees them, into images for the reward; None decodes
            as the pipeline does. "latents" decodes nothing: the reward gets the latents, the final
            ones as they left the last step.
        batches: How many particles are worked on at a time.
        previews: Whether the result keeps the decoded predictions of every scoring.
        preview_vae: An autoencoder that decodes predictions on the way in the place of the
            pipeline's, such as diffusers' `AutoencoderTiny` for the same latents; gradients of a
            twist go through it. The final samples are decoded by the pipeline, and weighed by that.
        preview_size: Longer side in pixels to which decoded predictions on the way are averaged
            down before they are scored; None for that of the call.
        twist: Strength s with which fresh noise is shifted along the gradient of the reward, or a
            `Twist`; 0 shifts nothing. The reward has to be differentiable. Weights are corrected,
            so that the target stays what it is; those of a strategy that samples no known law are
            not.
        look_ahead: Network calls with which samples are drawn of each particle's future wherever it
            is scored, in the pipeline's own loop; these are scored instead of the denoised
            prediction. 0 draws none. They count as network calls, and are not among
            `num_inference_steps`.
        look_ahead_samples: Number of such samples.
        distributed: Whether the processes of `torch.distributed`, each with a pipeline of its own
            on its own device, share the particles of a call: "auto" if a process group is
            initialised, as `accelerate launch` does; False for a call of this process alone. All
            have to make the same call, and all get its result.

    Raises:
        ValueError: if an option is out of range, the reward is no function of images and prompts,
            the pipeline cannot be steered or its scheduler has no GLASS counterpart. Options that
            are set later are checked in the call.
    """

    __signature__ = _OfItsPipeline()

    def __init__(
        self,
        pipe: Any,
        reward: Reward,
        strategy: Strategy[Any] = FeynmanKac(),  # noqa: B008 (frozen)
        num_particles: int = 8,
        *,
        num_transitions: int | None = None,
        decode: Decode | Literal["latents"] | None = None,
        batches: MicroBatches = MicroBatches(),  # noqa: B008 (frozen)
        previews: bool = False,
        preview_vae: Any = None,
        preview_size: int | None = None,
        twist: float | Twist = 0.0,
        look_ahead: int = 0,
        look_ahead_samples: int = 1,
        distributed: Distributed = "auto",
    ) -> None:
        check_strategy(strategy)
        self.pipe = pipe
        self.reward = reward
        self.strategy = strategy
        self.num_particles = num_particles
        self.num_transitions = num_transitions
        self.decode = decode
        self.batches = batches
        self.previews = previews
        self.preview_vae = preview_vae
        self.preview_size = preview_size
        self.twist = twist
        self.look_ahead = look_ahead
        self.look_ahead_samples = look_ahead_samples
        self.distributed: Distributed = distributed
        self._check()  # what would fail in the call is refused now
        check_steerable(pipe)
        self.strategy.init(1, num_particles)
        self._scheduler()

    def __repr__(self) -> str:
        parts = [
            type(self.pipe).__name__,
            getattr(self.reward, "__name__", type(self.reward).__name__),
            repr(self.strategy),
            str(self.num_particles),
        ]
        return f"{type(self).__name__}({', '.join(parts)})"

    def _check(self) -> None:
        """Check the options, which may have been set anew since the steerer was made."""
        check_strategy(self.strategy)
        check_whole("num_particles", self.num_particles)
        check_reward(self.reward)
        if not (self.decode is None or self.decode == "latents" or callable(self.decode)):
            raise ValueError(
                'decode: expected None, "latents" or a function from latents to images, got '
                f'{self.decode!r}: None decodes as the pipeline does, and "latents" hands the '
                "reward the latents"
            )
        if self._twist() is not None and compares(self.reward):
            raise ValueError(
                f"twist: expected a reward with a gradient, got {type(self.reward).__name__}, "
                "which compares images: leave twist out, or take Sum"
            )
        self._ahead()
        self._check_previews()
        calibration = getattr(self.strategy, "calibration", None)
        if calibration is not None:
            calibration.check_scored(**self._scored_on_the_way())
        if not isinstance(self.batches, MicroBatches):
            raise ValueError(
                f"batches: expected MicroBatches(network=…, decode=…, reward=…), got "
                f"{self.batches!r}"
            )

    @property
    def strategy(self) -> Strategy[Any]:
        """The strategy; a scale that it leaves open is that of the reward."""
        return _scaled_as(self._strategy, self.reward)

    @strategy.setter
    def strategy(self, strategy: Strategy[Any]) -> None:
        self._strategy = strategy

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        select: Select = "all",
        record: bool = False,
        display: bool = False,
        **kwargs: Any,
    ) -> SteeringResult:
        """Draw and steer K images per prompt.

        Args:
            prompt: One prompt, or a list of P; None where the pipeline takes embeddings, class
                labels or an image.
            select: "all" returns the particles of each prompt, best first, "best" the best of each,
                "best_seen" the best of each among these and all ends of excursions (`look_ahead`),
                "sample" draws among them by their final weights (particles may occur twice). The
                best is the best one for the target: of a negative λ_r that of the lowest reward.
            record: Whether the result keeps the `trajectories` of its samples, for policy-gradient
                trainers: states, what was drawn of them, means and standard deviations. Every
                transition has to be of one network call.
            display: Whether a notebook shows the best decoded predictions at every scoring, in the
                place of those before.
            kwargs: The pipeline's own keyword arguments (`num_inference_steps`, `generator`,
                `output_type`, `height`, `callback_on_step_end` …). `num_images_per_prompt` is how
                many are returned of each prompt, of those that live in the end. A list of
                generators has one per prompt, or one per particle, prompt-major. With
                `return_dict=False` the tuple (images, result) is returned.

        Raises:
            ValueError: if `output_type` or `select` is unknown, more images are wanted than there
                are particles, the pipeline cannot be steered, there are as many images as
                particles, the reward does not return one finite score per particle, or transitions
                of several network calls are to be recorded.
            TypeError: for an argument that belongs to the constructor.
            RuntimeError: if a steered call of the same pipeline is under way.
            ProcessFailed: if another of the processes that share the call failed.

        A reward that reads a model, and has a method `load`, reads it before the pipeline runs.
        After any exception the pipeline is as it was before.
        """
        team = team_of(self.distributed)
        with team.together():
            return self._call(team, prompt, select, record, display, kwargs)

    def _call(
        self,
        team: Team,
        prompt: str | Sequence[str] | None,
        select: Select,
        record: bool,
        display: bool,
        kwargs: dict[str, Any],
    ) -> SteeringResult:
        """Make a call, whose particles a team of processes shares."""
        self._check()
        self._check_not_options(kwargs)
        check_prompt(prompt)
        check_generator(kwargs.get("generator"))
        as_tuple = not kwargs.pop("return_dict", True)
        ahead = self._ahead()
        wanted = take_wanted(kwargs, select, self.pipe, self._widths(), ahead is not None)
        if select == "best_seen" and compares(self.reward):
            raise ValueError(
                'select="best_seen": expected a reward that scores an image by itself, got '
                f'{type(self.reward).__name__}: take select="best"'
            )
        if record and select == "best_seen":
            raise ValueError(
                'record: expected samples of the chain itself, got select="best_seen", which may '
                'return ends of excursions: take select="best"'
            )
        recorder = Recorder() if record else None
        given = kwargs if prompt is None else {"prompt": prompt, **kwargs}
        asked = wanted._asdict() | {"record": record}
        if ahead is not None:
            check_counts_no_steps(self.pipe, given)
        ledger = Ledger()
        widths = self._widths()
        shrinks = widths[-1] < widths[0]
        run = PipelineRun(
            self.pipe, given, self.num_particles, self.batches, ledger, shrinks=shrinks, team=team
        )
        load_reward(self.reward)  # which may draw random numbers
        call_if_there(self.reward, "check_prompts", list(run.prompts))
        if draws_by_default(given):
            team.share_default_generators(run.device)
        scheduler = self._scheduler()
        number = wanted.num_images_per_prompt or widths[-1]
        written = recipe(
            self.pipe,
            scheduler,
            self.reward,
            self.strategy,
            self._options(),
            given
            | wanted._asdict()
            | {"num_images_per_prompt": number}
            | ({"record": True} if record else {}),
        )
        alike = {name: written[name] for name in ("versions", "pipeline", "scheduler", "reward")}
        team.agree(alike | {"strategy": self.strategy} | self._options() | given | asked)
        decode: Any = run.decoder() if self.decode is None else self.decode
        scorer = Scorer(
            self.reward,
            decode,
            run.prompts,
            self.num_particles,
            self.batches,
            ledger,
            partial(run.held_for_gradients, self.preview_vae),
            team,
            self._preview_decoder(run),
        )
        watch = None
        if display:  # the first process shows for all
            watch = Live(run.prompts[:: self.num_particles]) if team.rank == 0 else _nobody
        shape = (len(run.prompts) // self.num_particles, self.num_particles)
        population = Population(
            self.strategy,
            scorer,
            shape,
            self.previews,
            run.show,
            self._twist(),
            ahead,
            recorder,
            watch,
        )
        with ledger.timing("total"):
            # as floats, so that the reward sees no rounding
            output_type = "latent" if wanted.output_type == "latent" else "np"
            drawn = run(scheduler, population, output_type, self._own_decoder())
            result = ended(run, drawn, population, wanted, written, scheduler, self._own_decoder())
        ledger.received = team.received
        return (result.images, result) if as_tuple else result  # type: ignore[return-value]

    def calibrate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        apply: bool = True,
        **call: Any,
    ) -> Calibration:
        """Measure what the rewards on the way tell of the final ones; scale them by that.

        One call of the pipeline, in which every boundary is scored, no particle is moved and none
        is twisted: a value is that of the model's own transitions.

        Args:
            prompt: As in a call; some ten prompts or more, of the kind that will be steered.
            apply: Whether the strategy is given the calibration, as its `calibration`.
            call: The keyword arguments of a call: of the calls that will be steered, since a
                calibration belongs to their transitions and network calls.

        Returns:
            The calibration. Of fewer than 4 prompts or 4 particles it comes with a warning.

        Raises:
            ValueError: as a call does; if there are fewer than 2 transitions, network calls or
                particles, the run is interrupted, or the final rewards of no prompt differ; if
                it is to be applied to a strategy that takes no calibration, or whose reward
                scale is no number.
            TypeError: for an argument that belongs to the constructor.

        After any exception the steerer is as it was before.
        """
        self._check()
        self._check_not_options(call)
        if apply:
            self._check_calibrates()
        check_particles(self.num_particles)
        with team_of(self.distributed).together():
            load_reward(self.reward)  # which may tell its scale
            check_transitions(self._scheduler().config["glass"]["num_transitions"])
            call["return_dict"] = True
            unmoved = copy(self)
            unmoved.strategy = watched = Unmoved(self._target_scale())
            unmoved.previews, unmoved.twist = False, 0.0
            result = unmoved(prompt, **call)
        at = watched.boundaries
        if result.interrupted or [one.index for one in at] != [*range(1, len(at) + 1)]:
            raise ValueError(
                "calibrate: expected one run of transitions to its end, scored after each but the "
                f"last, got {'an interrupted one, ' * result.interrupted}scored after "
                f"{[one.index for one in at]}: calibrate with a call that runs through once"
            )
        num_calls = at[0].num_calls if at else 0
        calibration = replace(
            calibrate_from(result.scored, result.rewards, num_calls),
            **self._scored_on_the_way(),
        )
        warn_if_few(calibration)  # before it is applied, since a warning may be an error
        if apply:
            self.strategy = replace(self._strategy, calibration=calibration)  # type: ignore[type-var]
        return calibration

    def for_budget(
        self,
        num_inference_steps: int,
        *,
        network_calls: int | None = None,
        seconds: float | None = None,
        ledger: Ledger | None = None,
        num_prompts: int = 1,
    ) -> Self:
        """Return a steerer like this one, with as many particles as a budget pays for.

        It is a proposal: `num_particles` is the largest that the budget pays for and the strategy
        can do with. `num_transitions` stays what it is; if it is None, it is that of the strategy's
        calibration or list of scales, else 5 or, with fewer than 10 steps, half of the steps. A
        strategy with widths keeps their ratios, so that (16, 8, 4) may become (13, 6, 3).

        Args:
            num_inference_steps: Network calls of each particle.
            network_calls: Calls that may be spent, of all prompts together.
            seconds: Or the time that may be spent, by an earlier call's `ledger`: what it took for
                each network call, everything else included. More particles at a time may be
                quicker than that.
            ledger: `result.ledger` of an earlier call with the same number of steps and options.
            num_prompts: Prompts that share the budget.

        Raises:
            ValueError: if not exactly one budget is given, or it does not pay for two particles of
                each prompt.
        """
        check_whole("num_inference_steps", num_inference_steps)
        check_whole("num_prompts", num_prompts)
        if (network_calls is None) == (seconds is None) or (seconds is None) != (ledger is None):
            raise ValueError(
                "for_budget: expected network_calls=, or seconds= with ledger=, got "
                f"network_calls={network_calls!r}, seconds={seconds!r}, ledger={ledger!r}"
            )
        if seconds is not None and ledger is not None:
            given, calls = f"seconds={seconds:g}", affordable_calls(seconds, ledger)
        else:
            check_whole("network_calls", network_calls)
            given, calls = f"network_calls={network_calls}", int(network_calls or 0)
        transitions = num_transitions(self.strategy, self.num_transitions, num_inference_steps)
        widths = self._widths()
        check_enough(widths, transitions)
        chain = num_inference_steps, transitions
        budgets = proposals(calls // num_prompts, *chain, self.strategy, widths, self._ahead())
        for budget in budgets:  # from the largest on
            new = copy(self)
            new.num_particles, new.num_transitions = budget.num_particles, transitions
            if len(budget.widths) > 1:
                new.strategy = replace(self._strategy, widths=budget.widths)  # type: ignore[type-var]
            try:
                new.strategy.init(1, budget.num_particles)
            except ValueError:  # BeamSearch needs a multiple of its width
                continue
            return new
        raise ValueError(
            f"for_budget: expected enough for 2 particles of each of {num_prompts} prompt(s) in "
            f"{num_inference_steps} steps with {self.strategy!r}, got {given}, which pays for "
            f"{calls} network calls: raise the budget, or take fewer steps"
        )

    def _target_scale(self) -> float | None:
        """Return λ_r of the strategy, if it is a number."""
        scale: Any = getattr(self.strategy, "reward_scale", None)
        is_number = isinstance(scale, Real) and not isinstance(scale, bool)
        return float(scale) if is_number else None

    def _check_calibrates(self) -> None:
        """Check that the strategy can be given a calibration."""
        strategy = self.strategy
        names = [field.name for field in fields(strategy)] if is_dataclass(strategy) else []
        if "calibration" not in names:
            raise ValueError(
                "strategy: expected one that scales rewards by a calibration, as FeynmanKac() "
                f"does, got {strategy!r}: pass apply=False for the calibration alone"
            )
        proposal = "calibrate(..., apply=False).reward_scale"
        check_calibrates(getattr(strategy, "reward_scale", None), proposal)

    def _check_not_options(self, given: Mapping[str, Any]) -> None:
        """Check that no argument of a call is an option of the steerer."""
        options = {*inspect.signature(type(self).__init__).parameters, *self._options()}
        check_not_options(given, options, self)

    def _own_decoder(self) -> Decode | None:
        """Return the user's function from latents to images; None for the pipeline's."""
        return None if isinstance(self.decode, str) else self.decode

    def _scored_on_the_way(self) -> dict[str, Any]:
        """Return what the rewards on the way are those of, besides the run, for a calibration."""
        vae = self.preview_vae
        return {
            "look_ahead": self.look_ahead,
            "look_ahead_samples": self.look_ahead_samples,
            "preview_vae": None if vae is None else type(vae).__name__,
            "preview_size": self.preview_size,
        }

    def _check_previews(self) -> None:
        """Check the options by which predictions are decoded otherwise than final samples."""
        if self.preview_vae is not None and self.decode is not None:
            raise ValueError(
                "preview_vae: expected none with decode=, which decodes by itself: leave one of "
                "them out"
            )
        if self.preview_vae is not None:
            check_preview_vae(self.pipe, self.preview_vae)
        if self.preview_size is not None:
            check_whole("preview_size", self.preview_size)
            if self.decode == "latents":
                raise ValueError(
                    'preview_size: expected none with decode="latents", which decodes nothing: '
                    "leave it out"
                )

    def _preview_decoder(self, run: PipelineRun) -> Decode | None:
        """Return what decodes predictions on the way; None for what decodes final samples."""
        size, own = self.preview_size, self._own_decoder()
        if self.preview_vae is None and size is None:
            return None
        decode = run.decoder(self.preview_vae) if own is None else own
        return decode if size is None else at_size(decode, size)

    def _twist(self) -> Twist | None:
        """Return how particles are twisted; None for not at all."""
        twist = self.twist if isinstance(self.twist, Twist) else Twist(self.twist)
        return twist if twist.strength else None

    def _ahead(self) -> LookAhead | None:
        """Return the excursions from a boundary; None for none."""
        if is_whole(self.look_ahead) and self.look_ahead == 0:
            return None
        return LookAhead(self.look_ahead, self.look_ahead_samples)

    def _scheduler(self) -> GLASSScheduler:
        """Return a GLASS scheduler for the pipeline, made of its own."""
        native = self.pipe.scheduler
        options: dict[str, Any] = {}
        if "noise_scale" in self.pipe.config:
            options["noise_scale"] = self.pipe.config["noise_scale"]
        if self.num_transitions is not None:
            options["num_transitions"] = self.num_transitions
        asked_for_by_name = isinstance(native, FlowMatchEulerDiscreteScheduler)
        cls = GLASSFlowMatchScheduler if asked_for_by_name else GLASSScheduler
        return cls.from_scheduler(native, **options)

    def _widths(self) -> tuple[int, ...]:
        """Return how many particles of a prompt live in each part of a run."""
        return tuple(getattr(self.strategy, "widths", None) or (self.num_particles,))

    def _options(self) -> dict[str, Any]:
        """Return the options by the names that `FeynmanKacSteerer` has for them, for the recipe."""
        sizes = {BATCH_SIZE_OPTIONS[name]: size for name, size in vars(self.batches).items()}
        own = {
            "num_particles": self.num_particles,
            "previews": self.previews,
            "preview_vae": self.preview_vae,
            "preview_size": self.preview_size,
            "twist": self.twist,
            "look_ahead": self.look_ahead,
            "look_ahead_samples": self.look_ahead_samples,
        }
        strategy = self.strategy
        names = [field.name for field in fields(strategy)] if is_dataclass(strategy) else []
        return own | {name: getattr(strategy, name) for name in names} | sizes


def _nobody(*args: Any) -> None:
    """Watch, and show nothing."""


def _scaled_as(strategy: Strategy[Any], reward: Any) -> Strategy[Any]:
    """Return a strategy that leaves its reward scale open with that of the reward."""
    is_object = is_dataclass(strategy) and not isinstance(strategy, type)
    if is_object and getattr(strategy, "reward_scale", 0.0) is None:
        scale = getattr(reward, "reward_scale", 1.0)
        return replace(strategy, reward_scale=scale)  # type: ignore[type-var]
    return strategy
