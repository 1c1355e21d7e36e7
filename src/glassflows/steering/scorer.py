"""Latents → rewards of shape (P, K): decoding, the user's reward, and checks of what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..host.decode import Decode
from ..host.ledger import Ledger
from ..host.microbatch import MicroBatches, naming_batch_size

Reward = Callable[[Tensor, list[Any]], Any]


class Scorer:
    """Scores the particles of a run.

    Args:
        reward: Maps samples and their prompts to scores.
        decode: Maps latents to samples, or "latents" where the reward takes latents.
        prompts: The prompt of each particle, prompt-major.
        num_particles: K.
        batches: How many samples are decoded and scored at a time.
        ledger: Where decodes, reward calls and seconds are counted.
    """

    def __init__(
        self,
        reward: Reward,
        decode: Decode | Literal["latents"],
        prompts: Sequence[str | None],
        num_particles: int,
        batches: MicroBatches,
        ledger: Ledger,
    ) -> None:
        self.reward = reward
        self.decode = decode
        self.prompts = prompts
        self.num_particles = num_particles
        self.batches = batches
        self.ledger = ledger

    @property
    def wants_latents(self) -> bool:
        """Whether the reward takes latents, undecoded."""
        return self.decode == "latents"

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """Return what the reward sees of latents, float32."""
        decode = self.decode
        if isinstance(decode, str):
            return latents.float()
        size = self.batches.decode or len(latents)
        with self.ledger.timing("decode"), naming_batch_size("decode"):
            samples = torch.cat([decode(part) for part in latents.split(size)])
        self.ledger.decodes += len(latents)
        return samples

    @torch.no_grad()
    def score(self, samples: Tensor) -> Tensor:
        """Return the rewards of samples in slot order, shape (P, K), float64 on the CPU.

        Raises:
            ValueError: if the reward does not return one finite score per sample.
        """
        size = self.batches.reward or len(samples)
        with self.ledger.timing("reward"):
            parts = [
                self._scores(part, list(self.prompts[i * size :][: len(part)]))
                for i, part in enumerate(samples.split(size))
            ]
        rewards = torch.cat(parts)
        self.ledger.reward_calls += len(rewards)
        if not rewards.isfinite().all():
            raise ValueError(
                f"reward returned {rewards.tolist()}; expected finite scores: check the images it "
                "was given"
            )
        return rewards.view(-1, self.num_particles)

    def _scores(self, samples: Tensor, prompts: list[str | None]) -> Tensor:
        with naming_batch_size("reward"):
            scores = self.reward(samples, prompts)
        if scores is None:
            raise ValueError("reward returned None; expected one score per particle: return them")
        scores = torch.as_tensor(scores).detach().to("cpu", torch.float64)
        if scores.shape != (len(samples),):
            raise ValueError(
                f"reward returned shape {tuple(scores.shape)}; expected one score per particle, "
                f"shape ({len(samples)},): return one float for each image"
            )
        return scores

    def preview(self, samples: Tensor) -> Tensor:
        """Return images as bytes; latents and sound, which are not in [0, 1], as they are."""
        if self.wants_latents or samples.ndim < 4:
            return samples.to("cpu", copy=True)
        return (samples.clamp(0, 1) * 255).round().to("cpu", torch.uint8)
