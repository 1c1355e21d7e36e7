"""Latents → rewards of shape (P, K): decoding, the user's reward, and checks of what it returns."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..host.decode import Decode
from ..host.ledger import Ledger
from ..host.microbatch import MicroBatches, naming_batch_size

Reward = Callable[[Tensor, list[Any]], Any]

_LATE = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)


def check_reward(reward: Any) -> None:
    """Raise ValueError unless an object can be called with images and prompts, as far as it tells.

    What it returns is seen only when it is called.
    """
    if isinstance(reward, type):
        name = reward.__name__
        raise ValueError(f"reward: expected an object, got the class {name}: write {name}()")
    if not callable(reward):
        raise ValueError(
            f"reward: expected a function of images and prompts, got {type(reward).__name__}"
        )
    as_module = type(reward).__call__ is torch.nn.Module.__call__
    function = getattr(reward, "forward") if as_module else reward  # noqa: B009 (for checkers)
    if any(late(method) for late in _LATE for method in (function, type(function).__call__)):
        raise ValueError(
            "reward: expected a function that returns one score per image, got one that is async "
            "or yields: return a list of numbers or a tensor, computed"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some of C's do not tell
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ValueError(
            f"reward: expected a function of images and prompts, got one of {signature} ({error}): "
            "wrap it, lambda images, prompts: reward(images)"
        ) from None


def load_reward(reward: Any) -> None:
    """Have a reward read its model, if it has a method for that."""
    load = getattr(reward, "load", None)
    if not callable(load):
        return
    try:
        inspect.signature(load).bind()
    except (TypeError, ValueError):  # it loads something else
        return
    load()


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
            samples = torch.cat([_checked(decode(part), part) for part in latents.split(size)])
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
        scores = _numbers(scores)
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


def _checked(samples: Any, latents: Tensor) -> Tensor:
    """Return what `decode` returned, one sample for each latent."""
    if isinstance(samples, Tensor) and samples.ndim > 0 and len(samples) == len(latents):
        return samples
    got = f"shape {tuple(samples.shape)}" if isinstance(samples, Tensor) else type(samples).__name__
    raise ValueError(
        f"decode returned {got}; expected a tensor with a sample for each of {len(latents)} "
        "latents: return images (N, 3, H, W) in [0, 1]"
    )


def _numbers(scores: Any) -> Tensor:
    """Return what a reward returned as a tensor, float64 on the CPU."""
    if scores is None:
        raise ValueError("reward returned None; expected one score per particle: return them")
    if inspect.iscoroutine(scores):
        scores.close()  # it is never awaited
    if inspect.isawaitable(scores) or isinstance(scores, (Iterator, AsyncIterator)):
        raise ValueError(
            f"reward returned a {type(scores).__name__}; expected one score per particle: return a "
            "list of numbers or a tensor, computed"
        )
    if isinstance(scores, Tensor):
        return scores.detach().cpu().double()
    try:  # numbers of Python are of double precision
        return torch.as_tensor(scores, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"reward returned {scores!r:.200}; expected one score per particle: return a list of "
            f"numbers or a tensor ({error})"
        ) from error
