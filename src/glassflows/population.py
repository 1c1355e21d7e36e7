"""One steered call: the filter's population between the pipeline's loop and the reward."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from .chunks import lowering
from .decode import Decode
from .pipelines import layout
from .randomness import row_seeds
from .result import Ledger, SteeringResult
from .scheduler import GLASSScheduler
from .smc import filter as smc
from .smc.potentials import potential_named
from .smc.resampling import resampling_named, systematic
from .smc.weights import normalise

Select = Literal["all", "best", "sample"]

AUTO_ESS = 0.5  # fraction of the particles that reward_scale="auto" leaves effective at the first scoring


class Population:
    """One steered call: the filter's state and what it has seen; the scheduler's hook."""

    def __init__(
        self, steerer: Any, scheduler: GLASSScheduler, prompts: list[str | None], decode: Decode | None
    ) -> None:
        self.steerer = steerer
        self.scheduler = scheduler
        self.decode = decode  # None where the reward wants latents
        self.prompts = prompts  # one per particle
        self.shape = (len(prompts) // steerer.num_particles, steerer.num_particles)
        self.state = smc.init(*self.shape)
        self.infos: list[smc.FilterInfo] = []
        self.potential = potential_named(steerer.potential)
        self.resampling = resampling_named(steerer.resampling)
        self.scored: list[Tensor] = []
        self.transitions: list[int] = []
        self.previews: list[Tensor] = []
        self.chosen = torch.full((self.shape[0], 1), torch.nan, dtype=torch.float64)  # λ_r of "auto"
        self.generators: list[torch.Generator] = []
        self.device = torch.device("cpu")  # of the latents
        self.copies = 0  # of the particles among the rows
        self.rows: list[Tensor | None] = []  # that went on, at each transition
        self.judged = False  # whether the scale has been held against rewards that differ
        self.ledger = Ledger()
        self.bar: Any = None

    @property
    def num_transitions(self) -> int:
        """Number of transitions of the run under way: as many as asked for, if there are as many calls."""
        return self.scheduler._calls[-1].k + 1

    @property
    def num_steps(self) -> int:
        """Number of steps that the run has taken, fewer than planned where it was interrupted."""
        return (self.scheduler.step_index or 0) - (self.scheduler.begin_index or 0)

    @property
    def last(self) -> Tensor:
        """The particles' latents as they left the last step of the scheduler."""
        progress = self.scheduler._progress
        if progress is None or progress.returned is None:
            raise ValueError(
                f"{type(self.steerer.pipe).__name__} was interrupted before its first step: no latents yet"
            )
        return progress.returned[: len(self.prompts)]

    # ---- the hook ----------------------------------------------------------------------------------------------------

    def __call__(self, k: int, x_t: Tensor, denoised: Tensor) -> Tensor | None:
        """Score the denoised predictions at the start of transition k; return the rows that go on, None for all."""
        number = len(self.prompts)
        if k == 0:  # from pure noise every prediction is nearly E[z]: nothing to score yet
            if self.rows:
                raise ValueError(
                    f"{type(self.steerer.pipe).__name__} cannot be steered: it runs its scheduler more than once"
                )
            self.device = x_t.device
            self.copies = layout(x_t, number, self.steerer.pipe)
            seeds = torch.tensor(row_seeds(x_t[:number], stream=(-1,))).view(self.shape)
            self.generators = [torch.Generator().manual_seed(int(group[0])) for group in seeds]
        if k == 0 or not self._is_due(k):
            self.rows.append(None)
            return None
        samples = self.decoded(denoised[:number].to(x_t.dtype, copy=True))
        if self.steerer.previews:
            self.previews.append(self._preview(samples))
        rewards = self.score(samples)
        scale = self.scale(k / self.num_transitions, rewards)
        self.state, info = smc.step(
            self.state,
            self._scaled(scale, rewards),
            ess_threshold=self.steerer.ess_threshold,
            generators=self.generators,
            potential=self._potential,
            resampling=self.resampling,
        )
        self._warn_if_flat(rewards, scale)
        self.infos.append(info)
        self.scored.append(rewards)
        self.transitions.append(k)
        if self.bar is not None:
            self.bar.set_postfix(reward=f"{float(rewards.max()):.4g}", ess=f"{float(info.ess.mean()):.1f}")
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

    def _is_due(self, k: int) -> bool:
        steerer, done = self.steerer, k / self.num_transitions
        return steerer.start <= done <= steerer.stop and (k - 1) % steerer.score_every == 0

    def _potential(self, scaled: Tensor) -> Tensor:
        log_potential = torch.as_tensor(self.potential(scaled))
        if log_potential.shape != scaled.shape[1:] or not log_potential.isfinite().all():
            raise ValueError(
                f"potential returned {log_potential.tolist()}; expected finite values, one per particle, of shape "
                f"{tuple(scaled.shape[1:])}"
            )
        return log_potential

    # ---- rewards -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """Decode latents, so many at a time."""
        if self.decode is None:
            return latents.float()
        size = self.steerer.decode_batch_size or len(latents)
        with self.ledger.timing("decode"), lowering("decode_batch_size"):
            samples = torch.cat([self.decode(part) for part in latents.split(size)])
        self.ledger.decodes += len(latents)
        return samples

    def _preview(self, samples: Tensor) -> Tensor:
        """Return decoded images as bytes; latents and sound, which are not in [0, 1], as they are."""
        if self.decode is None or samples.ndim < 4:
            return samples.to("cpu", copy=True)
        return (samples.clamp(0, 1) * 255).round().to("cpu", torch.uint8)

    @torch.no_grad()
    def score(self, samples: Tensor) -> Tensor:
        """Return the rewards of samples in slot order, shape (P, K), float64 on the CPU."""
        size = self.steerer.reward_batch_size or len(samples)
        parts = []
        with self.ledger.timing("reward"):
            for i, part in enumerate(samples.split(size)):
                prompts = list(self.prompts[i * size : i * size + len(part)])
                with lowering("reward_batch_size"):
                    scores = self.steerer.reward(part, prompts)
                if scores is None:
                    raise ValueError("reward returned None; expected one score per particle: return them")
                scores = torch.as_tensor(scores).detach().to("cpu", torch.float64)
                if scores.shape != (len(part),):
                    raise ValueError(
                        f"reward returned shape {tuple(scores.shape)}; expected one score per particle, shape "
                        f"({len(part)},): return one float for each image"
                    )
                parts.append(scores)
        rewards = torch.cat(parts)
        self.ledger.reward_calls += len(rewards)
        if not rewards.isfinite().all():
            raise ValueError(
                f"reward returned {rewards.tolist()}; expected finite scores: check the images it was given"
            )
        return rewards.view(self.shape)

    def scale(self, done: float, rewards: Tensor) -> Tensor:
        """Return λ_r of each group, shape (P, 1), when a fraction of the transitions is done."""
        given: Any = self.steerer.reward_scale
        if isinstance(given, str):  # "auto"
            found = smc.scale_for_ess(rewards, AUTO_ESS)[:, None]
            self.chosen = torch.where(self.chosen.isnan(), found, self.chosen)
            return self.chosen.nan_to_num(0.0)  # 0 as long as there is nothing to choose by
        if callable(given):
            value: Any = given(done)
        elif isinstance(given, float):
            value = given
        else:
            if len(given) != self.num_transitions:
                raise ValueError(
                    f"reward_scale: expected one per transition, {self.num_transitions}, got a list of {len(given)}"
                )
            value = given[round(done * len(given)) - 1]
        return torch.full((self.shape[0], 1), float(value), dtype=torch.float64)

    def _scaled(self, scale: Tensor, rewards: Tensor) -> Tensor:
        scaled = scale * rewards
        if not scaled.isfinite().all():
            raise ValueError(
                f"reward_scale={scale[:, 0].tolist()} times rewards {rewards.tolist()} is not finite; expected "
                "numbers: check what reward_scale returns"
            )
        return scaled

    def _warn_if_flat(self, rewards: Tensor, scale: Tensor) -> None:
        """Say at the first scoring whose rewards differ, if so, that the scale hardly tells particles apart."""
        if self.judged or isinstance(self.steerer.reward_scale, str) or not (scale * rewards).diff().any():
            return
        self.judged = True
        weights = rewards.shape[1] * normalise(scale * rewards).exp()
        furthest = float((weights - 1).abs().max())
        if furthest < 0.02:
            better = math.copysign(float(smc.scale_for_ess(rewards, AUTO_ESS).nanmedian()), float(scale.max()))
            warnings.warn(
                f"reward_scale={float(scale.max()):g} leaves the weights within {furthest:.1%} of uniform: steering "
                f"does next to nothing. About {better:.3g} would leave half of the particles effective.",
                stacklevel=2,
            )

    def watch(self, bar: Any) -> None:
        """Show best reward and mean ESS on the pipeline's own progress bar from now on."""
        self.bar = bar

    # ---- the end -----------------------------------------------------------------------------------------------------

    def result(
        self, outputs: Any, output_type: str, select: Select, number: int, recipe: dict[str, Any]
    ) -> SteeringResult:
        """Weigh the final images (or latents) by their own rewards and put everything together."""
        output, interrupted = outputs[0], bool(getattr(self.steerer.pipe, "_interrupt", False))
        if not self.rows and not interrupted:
            raise ValueError(f"{type(self.steerer.pipe).__name__} cannot be steered: it never stepped its scheduler")
        if self.decode is None:
            samples = self.decoded(self.last)
        else:
            samples = self.decoded(output) if output_type == "latent" else _channels_first(output).to(self.device)
        rewards = self.score(samples)
        scale = self.scale(1.0, rewards)
        state = smc.finish(self.state, self._scaled(scale, rewards))
        log_weights = normalise(state.log_weights)
        order = rewards.argsort(dim=-1, descending=True, stable=True)[:, :number]
        if select == "sample":
            order = torch.cat(
                [systematic_draw(log_weights[i : i + 1], self.generators[i], number) for i in range(len(order))]
            )
        self.ledger.network_calls = len(self.prompts) * self.num_steps
        groups, particles = self.shape
        rows = (torch.arange(groups)[:, None] * particles + order).flatten()
        empty = torch.empty(0, groups, particles, dtype=torch.float64)
        return SteeringResult(
            images=_as_output(output, rows, output_type),
            others=_others(outputs, len(self.prompts), rows),
            rewards=rewards,
            log_weights=log_weights,
            ancestors=torch.stack([info.ancestors for info in self.infos]) if self.infos else empty.long(),
            resampled=torch.stack([info.resampled for info in self.infos]) if self.infos else empty[..., 0].bool(),
            ess=torch.stack([info.ess for info in self.infos]) if self.infos else empty[..., 0],
            scored=torch.stack(self.scored) if self.scored else empty,
            transitions=tuple(self.transitions),
            log_evidence=smc.log_evidence(state),
            reward_scale=scale[:, 0],
            order=order,
            interrupted=interrupted,
            ledger=self.ledger,
            previews=torch.stack(self.previews) if self.previews else None,
            recipe=recipe,
        )


def systematic_draw(log_weights: Tensor, generator: torch.Generator, number: int) -> Tensor:
    """Return `number` slots drawn in proportion to their weights, shape (1, number)."""
    slots = systematic(log_weights, [generator])
    keep = torch.randperm(slots.shape[-1], generator=generator)[:number]
    return slots[:, keep]


def _channels_first(arrays: Any) -> Tensor:
    """Return images (N, H, W, 3), videos (N, frames, H, W, 3) or sound (N, …) as a new tensor, its channels first."""
    tensor = torch.tensor(np.asarray(arrays), dtype=torch.float32)
    if tensor.ndim >= 4:
        return tensor.movedim(-1, -3)
    return tensor[:, None] if tensor.ndim == 2 else tensor  # mono


def _others(outputs: Any, number: int, rows: Tensor) -> dict[str, Any]:
    """Return what else a pipeline puts out, sound or verdicts, of these rows where there is one for each sample."""
    found = {}
    for name, value in list(outputs.items())[1:] if isinstance(outputs, dict) else ():
        if isinstance(value, Tensor | np.ndarray) and value.ndim > 0 and len(value) == number:
            value = value[rows.to(value.device) if isinstance(value, Tensor) else rows.numpy()]
        elif isinstance(value, list) and len(value) == number:
            value = [value[i] for i in rows.tolist()]
        found[name] = value
    return found


def _as_output(output: Any, rows: Tensor, output_type: str) -> Any:
    """Return these rows of what the pipeline drew in the form that `output_type` names."""
    if output_type == "latent":
        return output[rows.to(output.device)]
    arrays = np.asarray(output)[rows.numpy()]
    if output_type == "pt":
        return _channels_first(arrays)
    if output_type == "np" or arrays.ndim < 4:  # sound
        return arrays
    flat = np.ascontiguousarray(arrays.reshape(-1, *arrays.shape[-3:]))
    images = VaeImageProcessor.numpy_to_pil(flat)
    if arrays.ndim == 4:
        return images
    frames = arrays.shape[1]
    return [images[i : i + frames] for i in range(0, len(images), frames)]
