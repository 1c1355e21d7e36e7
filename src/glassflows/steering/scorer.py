"""Latents → rewards of shape (P, K): decoding, the user's reward, and checks of what it returns."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..host.decode import Decode
from ..host.ledger import Ledger
from ..host.microbatch import MicroBatches, naming_batch_size
from ..host.team import ALONE, Team
from ..signatures import call_if_there

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


def compares(reward: Any) -> bool:
    """Return whether a reward compares the samples of a prompt, so that it needs all of them."""
    return bool(getattr(reward, "in_groups", False)) and _has_parts(reward)


def _has_parts(reward: Any) -> bool:
    """Return whether a reward is composed of others, as `glassflows.rewards.Sum` is.

    It has methods `parts(images, prompts)`, which returns their scores by name, and
    `joined(parts)`, which returns its own scores, and says that it is composed.
    """
    return bool(getattr(reward, "is_composed", False))


def load_reward(reward: Any) -> None:
    """Have a reward read its model, if it has a method for that."""
    with torch.inference_mode(False):  # else its weights could never be differentiated through
        call_if_there(reward, "load")


_HALF_FACTOR = 2.0**10
"""What gradients in float16 are multiplied by: those of single pixels are below its numbers."""


class Scored(NamedTuple):
    """Rewards of latents.

    Args:
        rewards: Shape (P, K), float64; of a part of the particles, (N,).
        preview: What the reward saw, shape (N, …), as it is kept or shown; None unless asked for.
        gradients: ∇ r of each sample in its latents, shape (N, *event), float32; None unless asked
            for.
        parts: The scores that a composed reward is made of by their names, shaped like the rewards;
            None of any other reward.
    """

    rewards: Tensor
    preview: Tensor | None = None
    gradients: Tensor | None = None
    parts: dict[str, Tensor] | None = None


class Scorer:
    """Scores the particles of a run.

    Args:
        reward: Maps samples and their prompts to scores.
        decode: Maps latents to samples, or "latents" where the reward takes latents.
        prompts: The prompt of each particle, prompt-major.
        num_particles: K.
        batches: How many samples are decoded and scored at a time.
        ledger: Where decodes, reward calls, gradients and seconds are counted.
        held_for_gradients: Context in which what `decode` runs stays as it is from a decode to its
            backward.
        team: The processes, each of which decodes and scores its share.
        eyes: Maps the latents of predictions to samples; None for `decode`. Final samples are those
            of `decode`.
    """

    def __init__(
        self,
        reward: Reward,
        decode: Decode | Literal["latents"],
        prompts: Sequence[str | None],
        num_particles: int,
        batches: MicroBatches,
        ledger: Ledger,
        held_for_gradients: Callable[[], AbstractContextManager[None]] = nullcontext,
        team: Team = ALONE,
        eyes: Decode | None = None,
    ) -> None:
        self.team = team
        self.eyes = decode if eyes is None else eyes
        self.held_for_gradients = held_for_gradients
        self.reward = reward
        self.decode = decode
        self.prompts = prompts
        self.num_particles = num_particles
        self.batches = batches
        self.ledger = ledger

    def shrink(self, particles: int) -> None:
        """Score the first particles of each prompt alone from now on."""
        groups = range(0, len(self.prompts), self.num_particles)
        self.prompts = [one for i in groups for one in self.prompts[i : i + particles]]
        self.num_particles = particles

    @property
    def sees_otherwise(self) -> bool:
        """Whether predictions are decoded in another way than final samples."""
        return self.eyes is not self.decode

    def of_each_prompt(self) -> Scorer:
        """Return a scorer of one sample for each prompt, with the same ledger."""
        one = copy(self)
        one.shrink(1)
        return one

    @property
    def wants_latents(self) -> bool:
        """Whether the reward takes latents, undecoded."""
        return self.decode == "latents"

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """Return what the reward sees of final latents, float32."""
        self._count(decodes=len(latents))
        parts = self.team.shared(
            "the decoder", latents, lambda some, _: self._decoded(some, self.decode)
        )
        return torch.cat(parts)

    @torch.no_grad()
    def score(self, samples: Tensor) -> Scored:
        """Return the rewards of samples in slot order, float64 on the CPU.

        Raises:
            ValueError: if the reward does not return one finite score per sample.
        """
        self._count(reward_calls=len(samples))
        return self._joined(self.team.shared("the reward", samples, self._scored))

    @torch.no_grad()
    def scored(self, latents: Tensor, keep: bool = False) -> Scored:
        """Return the rewards of predictions, and previews of what the reward saw if they are kept.

        Raises:
            ValueError: if the reward does not return one finite score per sample.
        """
        self._count(decodes=len(latents), reward_calls=len(latents))

        def of_some(some: Tensor, first: int) -> Scored:
            samples = self._decoded(some, self.eyes)
            preview = self.preview(samples) if keep else None  # the reward may write into them
            return self._scored(samples, first)._replace(preview=preview)

        return self._joined(self.team.shared("the reward", latents, of_some))

    def graded(self, latents: Tensor, dtype: torch.dtype, keep: bool = False) -> Scored:
        """Return the rewards of latents, their gradients in these, and previews if they are kept.

        Some particles at a time are decoded, scored and differentiated.

        Args:
            latents: Shape (N, *event), float32.
            dtype: What latents are decoded in.
            keep: Whether previews are wanted.

        Raises:
            ValueError: if the reward does not return one finite score per sample, or one without a
                gradient.
        """
        number = len(latents)
        self._count(decodes=number, reward_calls=number, gradients=number)

        def of_some(some: Tensor, first: int) -> Scored:
            sizes = (self.batches.decode, self.batches.reward, len(some))
            size = min(one for one in sizes if one is not None)
            return _in_one(
                [
                    self._graded(part, first + i * size, dtype, keep)
                    for i, part in enumerate(some.split(size))
                ]
            )

        graded = self._joined(self.team.shared("the gradient", latents, of_some))
        if graded.gradients is None or not graded.gradients.isfinite().all():
            raise ValueError(
                "twist: the gradient of the reward in the latents is not finite; expected numbers: "
                "run the decoder and the reward in float32 or bfloat16, or leave twist out"
            )
        return graded

    def _count(self, **counts: int) -> None:
        """Count what all processes together are about to do."""
        for name, number in counts.items():
            if name != "decodes" or not self.wants_latents:
                setattr(self.ledger, name, getattr(self.ledger, name) + number)

    def _joined(self, parts: list[Scored]) -> Scored:
        """Return the parts of all processes as one, with rewards of shape (P, K)."""
        scored = _in_one(parts)
        shape, rewards, of_reward = (-1, self.num_particles), scored.rewards, scored.parts
        if of_reward is not None:
            of_reward = {
                name: self._finite(part, name).view(shape) for name, part in of_reward.items()
            }
            if compares(self.reward):
                rewards = self.reward.joined(of_reward)  # type: ignore[attr-defined]
        return scored._replace(rewards=self._finite(rewards).view(shape), parts=of_reward)

    def _decoded(self, latents: Tensor, decode: Decode | str) -> Tensor:
        """Return samples of latents, as many at a time as are allowed."""
        size = self.batches.decode or len(latents)
        return torch.cat([self._samples(part, decode) for part in latents.split(size)])

    def _samples(self, latents: Tensor, decode: Decode | str) -> Tensor:
        if isinstance(decode, str):
            return latents.float()
        with self.ledger.timing("decode"), naming_batch_size("decode"):
            return _checked(decode(latents), latents)

    def _scored(self, samples: Tensor, first: int) -> Scored:
        """Return the rewards of the samples of slots `first`, `first` + 1, …"""
        size = self.batches.reward or len(samples)
        parts = enumerate(samples.split(size))
        return _in_one([self._scores(part, first + i * size) for i, part in parts])

    def _graded(self, latents: Tensor, first: int, dtype: torch.dtype, keep: bool) -> Scored:
        ledger = self.ledger
        factor = _HALF_FACTOR if dtype == torch.float16 else 1.0
        with torch.inference_mode(False), torch.enable_grad(), self.held_for_gradients():
            z = latents.clone().requires_grad_()
            written = z.to(dtype, copy=True)  # a decoder may write into it
            samples = self._samples(written, self.eyes)
            if not samples.requires_grad:
                raise ValueError(
                    "twist: expected decode to return images with a gradient in the latents, got "
                    "some without: decode without no_grad and detach, or leave twist out"
                )
            preview = self.preview(samples.detach()) if keep else None
            scored = self._scores(samples, first)
            scores, gradient = scored.rewards, None
            if scores.requires_grad:
                with ledger.timing("gradient"), naming_batch_size("decode"):
                    total = factor * scores.sum()
                    (gradient,) = torch.autograd.grad(total, z, allow_unused=True)
            if gradient is None:
                raise ValueError(
                    "twist: expected a reward with a gradient in its images, got scores without: "
                    "compute them by torch from the tensor that the reward is given, without "
                    "no_grad, detach, .item() or pictures, or leave twist out"
                )
        return Scored(scores.detach(), preview, gradient / factor, scored.parts)

    def _scores(self, samples: Tensor, first: int) -> Scored:
        """Return the scores of the samples of slots `first`, `first` + 1, …, float64 on the CPU."""
        prompts, parts = list(self.prompts[first:][: len(samples)]), None
        with self.ledger.timing("reward"), naming_batch_size("reward"):
            if _has_parts(self.reward):
                composed: Any = self.reward
                parts = composed.parts(samples, prompts)
                scores = composed.joined(parts)
                parts = {name: _numbers(part).detach() for name, part in parts.items()}
            else:
                scores = self.reward(samples, prompts)
        scores = _numbers(scores)
        if scores.shape != (len(samples),):
            raise ValueError(
                f"reward returned shape {tuple(scores.shape)}; expected one score per particle, "
                f"shape ({len(samples)},): return one float for each image"
            )
        return Scored(scores, parts=parts)

    def _finite(self, rewards: Tensor, name: str = "reward") -> Tensor:
        if not rewards.isfinite().all():
            raise ValueError(
                f"{name} returned {rewards.tolist()}; expected finite scores: check the images it "
                "was given"
            )
        return rewards

    def preview(self, samples: Tensor) -> Tensor:
        """Return images as bytes; latents and sound, which are not in [0, 1], as they are."""
        if self.wants_latents or samples.ndim < 4:
            return samples.to("cpu", copy=True)
        return (samples.clamp(0, 1) * 255).round().to("cpu", torch.uint8)


def _in_one(parts: list[Scored]) -> Scored:
    """Return the parts of a population as one."""
    rewards, previews, gradients, composed = zip(*parts, strict=True)
    preview, gradient = (
        None if one[0] is None else torch.cat(one) for one in (previews, gradients)
    )
    names = composed[0] or ()
    joined = {name: torch.cat([one[name] for one in composed]) for name in names}
    return Scored(torch.cat(rewards), preview, gradient, joined or None)


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
        return scores.cpu().to(torch.float64, copy=True)  # a reward may use its tensor again
    try:  # numbers of Python are of double precision
        return torch.as_tensor(scores, dtype=torch.float64, device="cpu").clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"reward returned {scores!r:.200}; expected one score per particle: return a list of "
            f"numbers or a tensor ({error})"
        ) from error
