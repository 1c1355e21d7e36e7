"""FeynmanKacSteerer: the bridge between the scheduler's transitions and the particle filter."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from .chunks import chunked, lowering
from .decode import Decode, PipelineCall, decoder
from .flow_match import GLASSFlowMatchScheduler
from .pipelines import COUNTS, arranged, check_steerable, settled_sizes, watched_bar
from .population import Population, Select
from .result import SteeringResult, versions
from .scheduler import GLASSScheduler
from .smc.potentials import Potential, potential_named
from .smc.resampling import resampling_named

Reward = Callable[[Tensor, list[Any]], Any]
RewardScale = float | Literal["auto"] | Sequence[float] | Callable[[float], float]


class FeynmanKacSteerer:
    """Sample a pipeline from p(z) exp(λ_r r(z)) with K particles per prompt and GLASS transitions.

    At the start of every transition but the first, the denoised predictions (free: the network's first call there) are
    decoded and scored; a prompt's particles are resampled when their effective sample size has fallen too low. With
    `ess_threshold=0` they never are: this is best-of-K, with the same accounting; with as many transitions as steps it
    is steering of the ancestral sampler.

    Args:
        pipe: Any pipeline whose scheduler has a GLASS counterpart. Its scheduler is replaced for the call and put back.
        reward: `reward(images, prompts)` gets float images (N, 3, H, W) in [0, 1], or videos (N, frames, 3, H, W), or
            waveforms (N, channels, samples), and one prompt per particle (None where only embeddings were given), and
            returns N scores, higher is better.
        num_particles: K, particles per prompt.
        reward_scale: λ_r; None takes `reward.reward_scale` where the reward has one, else 1. A list has one per
            transition, a function maps the fraction of transitions done, in (0, 1], to λ_r; the last one is that of the
            target. "auto" chooses for each prompt, at the first scoring whose rewards differ, the λ_r that leaves half
            of the particles effective, and keeps it: the target then depends on the draw; `result.reward_scale` tells.
        potential: How rewards on the way turn into weights: "difference", "max", "sum", or a function of the scaled
            rewards along each particle's ancestry, shape (S, P, K). The final weighing pays the rest, so that every
            particle's log-potentials sum to λ_r r(final).
        resampling: "systematic", "stratified", "residual", "ssp" or "multinomial".
        ess_threshold: Resample a group when its ESS falls below this fraction of K; 0 never resamples, 1 whenever
            weights differ.
        num_transitions: Number of transitions; None keeps that of a GLASSScheduler in the pipeline, else its default.
        score_every: Score at every so many transitions.
        start: Score from this fraction of the transitions on.
        stop: Score up to this fraction of the transitions.
        decode: Turns latents, as the scheduler sees them, into images for the reward; None decodes as the pipeline
            does. "latents" decodes nothing: the reward gets the latents, the final ones as they left the last step.
        particle_batch_size: Particles the networks see at a time, inside the pipeline's own loop; None for all.
        decode_batch_size: Latents decoded at a time, on the way and in the pipeline at the end; None for all.
        reward_batch_size: Samples scored at a time; None for all.
        previews: Whether the result keeps the decoded predictions of every scoring.

    Raises:
        ValueError: if an option is out of range, the pipeline cannot be steered or its scheduler has no GLASS
            counterpart.

    Reference:
        Singhal et al., arXiv:2501.06848; Holderrieth et al., arXiv:2509.25170, section 5.
    """

    def __init__(
        self,
        pipe: Any,
        reward: Reward,
        num_particles: int = 8,
        *,
        reward_scale: RewardScale | None = None,
        potential: str | Potential = "difference",
        resampling: str = "systematic",
        ess_threshold: float = 0.5,
        num_transitions: int | None = None,
        score_every: int = 1,
        start: float = 0.0,
        stop: float = 1.0,
        decode: Decode | Literal["latents"] | None = None,
        particle_batch_size: int | None = None,
        decode_batch_size: int | None = None,
        reward_batch_size: int | None = None,
        previews: bool = False,
    ) -> None:
        counts = {"num_particles": num_particles, "score_every": score_every, "decode_batch_size": decode_batch_size,
                  "particle_batch_size": particle_batch_size, "reward_batch_size": reward_batch_size}  # fmt: skip
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 0 <= ess_threshold <= 1:
            raise ValueError(f"ess_threshold: expected a fraction of num_particles in [0, 1], got {ess_threshold}")
        if not 0 <= start <= stop <= 1:
            raise ValueError(f"start, stop: expected fractions 0 ≤ start ≤ stop ≤ 1, got {start}, {stop}")
        if not callable(reward):
            raise ValueError(f"reward: expected a function of images and prompts, got {type(reward).__name__}")
        self.pipe = pipe
        self.reward = reward
        self.num_particles = num_particles
        own_scale = getattr(reward, "reward_scale", 1.0)
        self.reward_scale = _checked_scale(own_scale if reward_scale is None else reward_scale)
        potential_named(potential)  # refuses unknown names, as does the next
        resampling_named(resampling)
        self.potential, self.resampling = potential, resampling
        self.ess_threshold = ess_threshold
        self.options = {} if num_transitions is None else {"num_transitions": num_transitions}
        self.score_every, self.start, self.stop = score_every, start, stop
        self.decode = decode
        self.decode_batch_size, self.reward_batch_size = decode_batch_size, reward_batch_size
        self.particle_batch_size = particle_batch_size
        self.previews = previews
        check_steerable(pipe)  # refuses now what would fail in the call
        self._scheduler()

    def __call__(
        self, prompt: str | Sequence[str] | None = None, *, select: Select = "all", **kwargs: Any
    ) -> SteeringResult:
        """Draw and steer K images per prompt.

        Args:
            prompt: One prompt, or a list of P; None where the pipeline takes embeddings, class labels or an image.
            select: "all" returns the particles of each prompt, best first, "best" the best of each, "sample" draws
                among them by their final weights (particles may occur twice).
            kwargs: The pipeline's own keyword arguments (`num_inference_steps`, `generator`, `output_type`, `height`,
                `callback_on_step_end` …). `num_images_per_prompt` is how many are returned of each prompt, of the K.
                A list of generators has one per prompt, or one per particle, prompt-major. With `return_dict=False`
                the tuple (images, result) is returned.

        Raises:
            ValueError: if `output_type` or `select` is unknown, more images are wanted than there are particles, the
                pipeline cannot be steered, there are as many images as particles, or the reward does not return one
                finite score per particle.

        After any exception the pipeline is as it was before.
        """
        output_type = kwargs.pop("output_type", "pil")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'output_type: expected "pil", "np", "pt" or "latent", got {output_type!r}')
        if select not in get_args(Select):
            raise ValueError(f"select: expected one of {get_args(Select)}, got {select!r}")
        as_tuple = not kwargs.pop("return_dict", True)
        wanted = [count for name in COUNTS if (count := kwargs.pop(name, None)) is not None]
        number = wanted[0] if wanted else (1 if select == "best" else self.num_particles)
        if not 1 <= number <= self.num_particles:
            raise ValueError(f"num_images_per_prompt: expected 1 to num_particles={self.num_particles}, got {number}")
        check_steerable(self.pipe)
        given = kwargs if prompt is None else {"prompt": prompt, **kwargs}
        scheduler = self._scheduler()
        asked = {"output_type": output_type, "select": select, "num_images_per_prompt": number}
        recipe = self._recipe(scheduler, given | asked)  # before anything is drawn
        arguments, prompts = arranged(self.pipe, given, self.num_particles)
        if "generator" in kwargs:
            arguments["generator"] = _per_particle(kwargs["generator"], len(prompts), self.num_particles)

        with settled_sizes(self.pipe) as sizes:
            decode = self.decode or decoder(PipelineCall(self.pipe, given, sizes))
            run = Population(self, scheduler, prompts, decode if callable(decode) else None)
            scheduler.on_transition = run
            drawn = "latent" if output_type == "latent" else "np"  # floats; the reward sees no rounding
            with run.ledger.timing("total"):
                outputs = self._drawn(scheduler, run, arguments | {"output_type": drawn})
                result = run.result(outputs, output_type, select, number, recipe)
        return (result.images, result) if as_tuple else result  # type: ignore[return-value]

    def _drawn(self, scheduler: GLASSScheduler, run: Population, arguments: dict[str, Any]) -> Any:
        """Run the pipeline with the scheduler in the place of its own, in micro-batches, and put its own back."""
        native, number = self.pipe.scheduler, len(run.prompts)
        sizes = {"particles": self.particle_batch_size, "decodes": self.decode_batch_size}
        try:
            self.pipe.scheduler = scheduler
            with (
                chunked(self.pipe, number, **sizes, timing=run.ledger.timing),
                watched_bar(self.pipe, run.watch),
                lowering("particle_batch_size"),
            ):
                return self.pipe(**arguments)
        finally:
            self.pipe.scheduler = native

    def _scheduler(self) -> GLASSScheduler:
        native = self.pipe.scheduler
        by_name = isinstance(native, FlowMatchEulerDiscreteScheduler)  # some pipelines ask for it
        scale = {"noise_scale": self.pipe.config["noise_scale"]} if "noise_scale" in self.pipe.config else {}
        cls = GLASSFlowMatchScheduler if by_name else GLASSScheduler
        return cls.from_scheduler(native, **(scale | self.options))

    def _recipe(self, scheduler: GLASSScheduler, given: dict[str, Any]) -> dict[str, Any]:
        """Return what reproduces a call, as far as JSON can say it; to be taken before it draws."""
        own = {name: value for name, value in vars(self).items() if name not in ("pipe", "reward", "decode", "options")}
        drawing = {} if {"generator", "latents"} & given.keys() else {"global_generator": _default_generator(self.pipe)}
        return {
            "versions": versions(),
            "pipeline": type(self.pipe).__name__,
            "scheduler": {"native": dict(scheduler.config["native"]), "glass": dict(scheduler.config["glass"])},
            "reward": getattr(self.reward, "__name__", type(self.reward).__name__),
            "steerer": {name: _written(value) for name, value in own.items()},
            "call": {name: _written(value) for name, value in (given | drawing).items()},
        }


def _checked_scale(scale: Any) -> Any:
    if callable(scale) or (isinstance(scale, str) and scale == "auto"):
        return scale
    if isinstance(scale, str):
        raise ValueError(f'reward_scale: expected a number, a list, a function or "auto", got {scale!r}')
    plain = scale.tolist() if isinstance(scale, (Tensor, np.ndarray, np.generic)) else scale
    values = [float(one) for one in plain] if isinstance(plain, (list, tuple)) else float(plain)
    if not all(math.isfinite(one) for one in (values if isinstance(values, list) else [values])):
        raise ValueError(f"reward_scale: expected finite numbers, got {scale!r}")
    return values


def _per_particle(generator: Any, number: int, particles: int) -> Any:
    """Return a list of one generator per prompt as one per particle, seeded by it in turn; anything else as it is."""
    if not isinstance(generator, list) or particles == 1 or len(generator) * particles != number:
        return generator
    seeds = [torch.randint(2**62, (particles,), generator=one, device=one.device) for one in generator]
    return [torch.Generator().manual_seed(seed) for group in seeds for seed in group.tolist()]


def _default_generator(pipe: Any) -> torch.Generator:
    """Return what a pipeline draws from that is given no generator."""
    device = torch.device(pipe._execution_device)
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator


def _written(value: Any) -> Any:
    """Return a value as JSON can hold it: generators by seed and state, large arrays and images by their look."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Generator):
        seed, state = value.initial_seed(), value.get_state()
        written = {"seed": seed, "device": str(value.device)}
        if not torch.equal(state, torch.Generator(value.device).manual_seed(seed).get_state()):
            written["state"] = base64.b64encode(state.numpy().tobytes()).decode()  # it has been drawn from
        return written
    if isinstance(value, dict):
        return {str(name): _written(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_written(one) for one in value]
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        small = np.prod(value.shape) <= 1000
        return value.tolist() if small else f"{type(value).__name__} {tuple(value.shape)}"
    return getattr(value, "__name__", type(value).__name__)
