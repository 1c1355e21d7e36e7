"""The samples of a steered call as rows, one for each image: what a trainer takes.

A *group* is the samples of one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .display import as_picture
from .record import as_array
from .strategy import worth
from .trajectory import Trajectories

if TYPE_CHECKING:
    from .result import SteeringResult


@dataclass(frozen=True, eq=False)
class Samples:
    """N samples of a steered call, in the order of its images.

    Args:
        prompts: The prompt of each; None where only embeddings were given.
        groups: The number of its prompt in the call, shape (N,), int64.
        latents: Clean latents as the scheduler holds them (FLUX packs them), shape (N, *event).
        images: Images (N, 3, H, W) or videos (N, frames, 3, H, W), uint8; sound and latents as
            they are.
        rewards: Shape (N,), float64.
        worth: Rewards as the target counts them, higher for better: negated where λ_r is negative.
            Shape (N,), float64.
        log_weights: Weights of a sample of p(z) exp(λ_r r(z)), shape (N,), float64. Their
            exponentials sum to 1 in a group whose particles are all there. Samples that were drawn
            by weight weigh the same; the best end of an excursion has none, which is NaN.
        lineages: The slot of the ancestor at each scoring, then the own slot, shape (N, S + 1),
            int64; −1 for the best end of an excursion.
        trajectories: The transitions they took; None unless the call was to record them.
    """

    prompts: tuple[str | None, ...]
    groups: Tensor
    latents: Tensor
    images: Tensor
    rewards: Tensor
    worth: Tensor
    log_weights: Tensor
    lineages: Tensor
    trajectories: Trajectories | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def pairs(self, margin: float = 0.0) -> list[tuple[int, int]]:
        """Return the best and the worst sample of each group: pairs to train on by DPO.

        Args:
            margin: A pair whose rewards differ by no more is left out.
        """
        return best_and_worst(self.groups.tolist(), self.worth.tolist(), margin)

    def as_dict(self) -> dict[str, list[Any]]:
        """Return columns, such as `datasets.Dataset.from_dict` takes.

        Images are PIL images, videos lists of them. Everything else is numbers, lists and arrays.
        """
        return {
            "prompt": list(self.prompts),
            "image": [as_picture(one) for one in self.images],
            "latents": [as_array(one) for one in self.latents],
            "reward": self.rewards.tolist(),
            "log_weight": self.log_weights.tolist(),
            "lineage": self.lineages.tolist(),
            "group": self.groups.tolist(),
        }


def samples_of(result: SteeringResult) -> Samples:
    """Return the samples that a call returned.

    Raises:
        ValueError: if the result has no latents.
    """
    if result.latents is None:
        raise ValueError(
            "samples: expected a result with latents, got one of an interrupted run that took no "
            "step, or one that was saved by an earlier version: draw it again"
        )
    groups, each = result.order.shape
    slots = result.order.flatten().tolist()
    prompt = [group for group in range(groups) for _ in range(each)]
    scorings = len(result.transitions)
    lineages = [
        [-1] * (scorings + 1) if slot < 0 else result.lineage(group, slot)
        for group, slot in zip(prompt, slots, strict=True)
    ]
    rewards = result.image_rewards.view(groups, each)
    log_weights = result.log_weights.gather(1, result.order.clamp(min=0))
    log_weights = torch.where(result.order < 0, math.nan, log_weights)
    if result.recipe["call"].get("select") == "sample":
        log_weights = torch.full_like(log_weights, -math.log(each))
    return Samples(
        prompts=tuple(result.prompts[group] for group in prompt),
        groups=torch.tensor(prompt, device="cpu"),
        latents=result.latents,
        images=_as_bytes(result),
        rewards=rewards.flatten(),
        worth=worth(rewards, result.reward_scale).flatten(),
        log_weights=log_weights.flatten(),
        lineages=torch.tensor(lineages, device="cpu"),
        trajectories=result.trajectories,
    )


def best_and_worst(
    groups: Sequence[Any], worth: Sequence[float], margin: float
) -> list[tuple[int, int]]:
    """Return the indices of the best and the worst member of each group, if they differ by more.

    Args:
        groups: The group of each member.
        worth: What it is worth, higher for better.
        margin: The difference that is too small.
    """
    members: dict[Any, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    ends = [
        (max(some, key=worth.__getitem__), min(some, key=worth.__getitem__))
        for some in members.values()
    ]
    return [(best, worst) for best, worst in ends if worth[best] - worth[worst] > margin]


def _as_bytes(result: SteeringResult) -> Tensor:
    """Return images and videos as bytes, their channels first; other samples as they are."""
    images, films = result.images, result.films()
    if films is None:
        return torch.as_tensor(images, device="cpu").detach()
    still = all(len(film) == 1 for film in films) and not _are_videos(images)
    frames = [np.stack([np.atleast_3d(np.asarray(frame)) for frame in film]) for film in films]
    tensor = torch.from_numpy(np.stack(frames)).movedim(-1, -3)
    return tensor[:, 0] if still else tensor


def _are_videos(images: Any) -> bool:
    return isinstance(images[0], list) if isinstance(images, list) else images.ndim == 5
