"""FeynmanKacSteerer: the bridge between the scheduler's transitions and the particle filter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from .decode import Decode, PipelineCall, decoder
from .flow_match import GLASSFlowMatchScheduler
from .pipelines import COUNTS, arranged, check_steerable, layout, settled_sizes
from .randomness import row_seeds
from .scheduler import GLASSScheduler
from .smc import filter as smc
from .smc.resampling import draw_uniforms
from .smc.weights import normalise

Reward = Callable[[Tensor, list[Any]], Any]


@dataclass(frozen=True)
class SteeringResult:
    """What a steered call returns. P prompts, K particles each, S scorings on the way.

    Args:
        images: The P · K images (or videos, or waveforms), prompt-major, best first within each prompt; in the
            pipeline's own `output_type`.
        rewards: Reward of each final image, in slot order, shape (P, K), float64.
        log_weights: Final log-weights, normalised within each prompt, in slot order, shape (P, K).
        ancestors: Parent slots within the prompt's group at each scoring, shape (S, P, K), int64.
        ess: Effective sample size before resampling at each scoring, shape (S, P).
        log_evidence: Estimate of log E[exp(λ_r r)] over the model's own samples, shape (P,).
        order: Slot of each image, shape (P, K): `images[p * K + i]` came from slot `order[p, i]`.
    """

    images: Any
    rewards: Tensor
    log_weights: Tensor
    ancestors: Tensor
    ess: Tensor
    log_evidence: Tensor
    order: Tensor


class FeynmanKacSteerer:
    """Sample a pipeline from p(z) exp(λ_r r(z)) with K particles per prompt and GLASS transitions.

    At the start of every transition but the first, the denoised predictions (free: the network's first call there) are
    decoded and scored; a prompt's particles are resampled when their effective sample size has fallen too low.

    Args:
        pipe: Any pipeline whose scheduler has a GLASS counterpart. Its scheduler is replaced for the call and put back.
        reward: `reward(images, prompts)` gets float images (N, 3, H, W) in [0, 1], or videos (N, frames, 3, H, W), or
            waveforms (N, channels, samples), and one prompt per particle (None where only embeddings were given), and
            returns N scores, higher is better.
        num_particles: K, particles per prompt.
        reward_scale: λ_r; None takes `reward.reward_scale` where the reward has one, else 1.
        num_transitions: Number of transitions; None keeps that of a GLASSScheduler in the pipeline, else its default.
        ess_threshold: Resample a group when its ESS falls below this fraction of K; 0 never resamples.
        decode: Turns latents, as the scheduler sees them, into images for the reward; None decodes as the pipeline
            does.

    Raises:
        ValueError: if a number is out of range or the pipeline's scheduler has no GLASS counterpart.

    Reference:
        Singhal et al., arXiv:2501.06848; Holderrieth et al., arXiv:2509.25170, section 5.
    """

    def __init__(
        self,
        pipe: Any,
        reward: Reward,
        num_particles: int = 8,
        *,
        reward_scale: float | None = None,
        num_transitions: int | None = None,
        ess_threshold: float = 0.5,
        decode: Decode | None = None,
    ) -> None:
        if num_particles < 1:
            raise ValueError(f"num_particles: expected at least 1, got {num_particles}")
        if not 0 <= ess_threshold <= 1:
            raise ValueError(f"ess_threshold: expected a fraction of num_particles in [0, 1], got {ess_threshold}")
        self.pipe = pipe
        self.reward = reward
        self.num_particles = num_particles
        self.reward_scale = float(getattr(reward, "reward_scale", 1.0) if reward_scale is None else reward_scale)
        self.options = {} if num_transitions is None else {"num_transitions": num_transitions}
        self.ess_threshold = ess_threshold
        self.decode = decode
        check_steerable(pipe)  # refuses now what would fail in the call
        self._scheduler()

    def __call__(self, prompt: str | Sequence[str] | None = None, **kwargs: Any) -> SteeringResult:
        """Draw and steer K images per prompt.

        Args:
            prompt: One prompt, or a list of P; None where the pipeline takes embeddings, class labels or an image.
            kwargs: The pipeline's own keyword arguments (`num_inference_steps`, `generator`, `output_type`, `height`
                …); a list of generators has one per particle, prompt-major.

        Raises:
            TypeError: if `return_dict` or the number of images per prompt is given: the steerer sets both.
            ValueError: if `output_type` is unknown, the pipeline cannot be steered, or the reward does not return one
                finite score per particle.

        After any exception the pipeline is as it was before.
        """
        for name in ("return_dict", *COUNTS):
            if name in kwargs:
                raise TypeError(
                    f"{name}: the steerer sets this itself (num_particles={self.num_particles}): leave it out"
                )
        output_type = kwargs.pop("output_type", "pil")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'output_type: expected "pil", "np", "pt" or "latent", got {output_type!r}')
        check_steerable(self.pipe)
        given = kwargs if prompt is None else {"prompt": prompt, **kwargs}
        arguments, prompts = arranged(self.pipe, given, self.num_particles)

        native = self.pipe.scheduler
        scheduler = self._scheduler()
        with settled_sizes(self.pipe) as sizes:
            run = _Run(self, prompts, self.decode or decoder(PipelineCall(self.pipe, given, sizes)))
            scheduler.on_transition = run
            try:
                self.pipe.scheduler = scheduler
                drawn = "latent" if output_type == "latent" else "np"  # floats; the reward sees no rounding
                output = self.pipe(**arguments, output_type=drawn)[0]
            finally:
                self.pipe.scheduler = native
            return run.result(output, output_type)

    def _scheduler(self) -> GLASSScheduler:
        native = self.pipe.scheduler
        by_name = isinstance(native, FlowMatchEulerDiscreteScheduler)  # some pipelines ask for it
        scale = {"noise_scale": self.pipe.config["noise_scale"]} if "noise_scale" in self.pipe.config else {}
        cls = GLASSFlowMatchScheduler if by_name else GLASSScheduler
        return cls.from_scheduler(native, **(scale | self.options))


class _Run:
    """One steered call: the filter's state and what it has seen; the scheduler's hook."""

    def __init__(self, steerer: FeynmanKacSteerer, prompts: list[str | None], decode: Decode) -> None:
        self.steerer = steerer
        self.decode = decode
        self.prompts = prompts  # one per particle
        self.shape = (len(prompts) // steerer.num_particles, steerer.num_particles)
        self.state = smc.init(*self.shape)
        self.infos: list[smc.FilterInfo] = []
        self.generators: list[torch.Generator] = []
        self.copies = 0  # of the particles among the rows
        self.rows: list[Tensor | None] = []  # that went on, at each transition

    def __call__(self, k: int, x_t: Tensor, denoised: Tensor) -> Tensor | None:
        """Score the denoised predictions at the start of transition k; return the rows that go on, None for all."""
        number = len(self.prompts)
        if k == 0:  # from pure noise every prediction is nearly E[z]: nothing to score yet
            if self.rows:
                raise ValueError(
                    f"{type(self.steerer.pipe).__name__} cannot be steered: it runs its scheduler more than once"
                )
            self.copies = layout(x_t, number, self.steerer.pipe)
            seeds = torch.tensor(row_seeds(x_t[:number], stream=(-1,))).view(self.shape)
            self.generators = [torch.Generator().manual_seed(int(group[0])) for group in seeds]
            self.rows.append(None)
            return None
        self.state, info = smc.step(
            self.state,
            self.score(self.decode(denoised[:number].to(x_t.dtype, copy=True))),
            reward_scale=self.steerer.reward_scale,
            ess_threshold=self.steerer.ess_threshold,
            uniforms=draw_uniforms(self.generators),
        )
        self.infos.append(info)
        first = torch.arange(self.shape[0])[:, None] * self.shape[1]
        particles = (first + info.ancestors).flatten()
        rows = torch.cat([particles + copy * number for copy in range(self.copies)]).to(denoised.device)
        self.rows.append(rows if info.resampled.any() else None)
        return self.rows[-1]

    def follow(self) -> Callable[[int, Tensor, Tensor], Tensor | None]:
        """Return the hook of a copy of the scheduler (LTX-2's for sound): its rows go where these have gone."""

        def hook(k: int, x_t: Tensor, denoised: Tensor) -> Tensor | None:
            if k >= len(self.rows):
                raise ValueError(
                    f"{type(self.steerer.pipe).__name__} cannot be steered: a copy of its scheduler steps first"
                )
            return self.rows[k]

        return hook

    def score(self, images: Tensor) -> Tensor:
        """Return the rewards of images in slot order, shape (P, K), float64 on the CPU."""
        scores = self.steerer.reward(images, list(self.prompts))
        scores = torch.as_tensor(scores).detach().to("cpu", torch.float64)
        number = len(self.prompts)
        if scores.shape != (number,):
            raise ValueError(
                f"reward returned shape {tuple(scores.shape)}; expected one score per particle, shape ({number},): "
                "return one float for each image"
            )
        if not scores.isfinite().all():
            raise ValueError(
                f"reward returned {scores.tolist()}; expected finite scores: check the images it was given"
            )
        return scores.view(self.shape)

    def result(self, output: Any, output_type: str) -> SteeringResult:
        """Weigh the final images (or latents) by their own rewards and put everything together."""
        if not self.rows:
            raise ValueError(f"{type(self.steerer.pipe).__name__} cannot be steered: it never stepped its scheduler")
        rewards = self.score(self.decode(output) if output_type == "latent" else _for_reward(output))
        state = smc.weigh(self.state, rewards, self.steerer.reward_scale)
        order = rewards.argsort(dim=-1, descending=True, stable=True)
        rows = (torch.arange(self.shape[0])[:, None] * self.shape[1] + order).flatten()
        groups, particles = self.shape
        ancestors = [info.ancestors for info in self.infos]
        sizes = [info.ess for info in self.infos]
        return SteeringResult(
            images=_as_output(self.steerer.pipe, output, rows, output_type),
            rewards=rewards,
            log_weights=normalise(state.log_weights),
            ancestors=torch.stack(ancestors) if ancestors else torch.empty(0, groups, particles, dtype=torch.int64),
            ess=torch.stack(sizes) if sizes else torch.empty(0, groups, dtype=torch.float64),
            log_evidence=smc.log_evidence(state),
            order=order,
        )


def _for_reward(arrays: Any) -> Tensor:
    """Return images (N, H, W, 3), videos (N, frames, H, W, 3) or sound (N, …) as a tensor with its channels first."""
    tensor = torch.as_tensor(np.asarray(arrays)).float()
    if tensor.ndim >= 4:
        return tensor.movedim(-1, -3)
    return tensor[:, None] if tensor.ndim == 2 else tensor  # mono


def _as_output(pipe: Any, output: Any, rows: Tensor, output_type: str) -> Any:
    """Return these rows of what the pipeline drew in the form that `output_type` names."""
    if output_type == "latent":
        return output[rows.to(output.device)]
    arrays = np.asarray(output)[rows.numpy()]
    if output_type == "pt":
        return _for_reward(arrays)
    if output_type == "np" or arrays.ndim < 4:  # sound
        return arrays
    flat = np.ascontiguousarray(arrays.reshape(-1, *arrays.shape[-3:]))
    images = VaeImageProcessor.numpy_to_pil(flat)
    if arrays.ndim == 4:
        return images
    frames = arrays.shape[1]
    return [images[i : i + frames] for i in range(0, len(images), frames)]
