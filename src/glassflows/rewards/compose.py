"""Rewards made of rewards.

A composed reward scores the same images with each of its parts, and joins the parts' scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..signatures import call_if_there
from .images import Images
from .model import device_for, one_each

Reward = Callable[[Any, Any], Any]


class _Composed(ABC):
    """Several rewards, joined to one score per image.

    Attributes:
        in_groups: Whether the score of an image depends on the other images of its prompt.
    """

    in_groups = False
    _reward_scale: float | None = None

    def __init__(self, *rewards: Reward, weights: Sequence[float] | None = None) -> None:
        self.weights = (
            [1.0] * len(rewards) if weights is None else [float(weight) for weight in weights]
        )
        if not rewards or len(self.weights) != len(rewards):
            raise ValueError(
                f"weights: expected one for each reward, {len(rewards)}, got {len(self.weights)}"
            )
        self.rewards: dict[str, Reward] = {}
        for reward in rewards:
            if getattr(reward, "in_groups", False):
                name, own = type(reward).__name__, type(self).__name__
                raise ValueError(
                    f"{own}: expected rewards that score an image by itself, got {name}, which "
                    f"compares images: make {name} of all rewards, as the outermost"
                )
            name = base = _name(reward)
            same = 1
            while name in self.rewards:
                same += 1
                name = f"{base} {same}"
            self.rewards[name] = reward

    def __repr__(self) -> str:
        weighed = any(weight != 1 for weight in self.weights)
        weights = [f"weights={self.weights}"] * weighed
        return f"{type(self).__name__}({', '.join([*self.rewards, *weights])})"

    @property
    def reward_scale(self) -> float:
        """λ_r of a steerer that is given none."""
        return self._usual_scale() if self._reward_scale is None else self._reward_scale

    @reward_scale.setter
    def reward_scale(self, scale: float) -> None:
        self._reward_scale = scale

    def _usual_scale(self) -> float:
        """Return λ_r by the rewards, whose own may be known only when they have been loaded."""
        return 1.0

    @property
    def is_composed(self) -> bool:
        """Whether the scores are those that `joined` makes of `parts`."""
        return type(self).__call__ is _Composed.__call__

    def load(self) -> Self:
        """Read the models of the rewards, unless they have been read; return the reward itself.

        Raises:
            OSError: if the files of a model are not found, or do not hold such a model.
        """
        for reward in self.rewards.values():
            call_if_there(reward, "load")
        return self

    def check_prompts(self, prompts: Sequence[Any]) -> None:
        """Check prompts before images are drawn of them, as far as the rewards can.

        Raises:
            ValueError: if one of the rewards can make nothing of one of them.
        """
        for reward in self.rewards.values():
            call_if_there(reward, "check_prompts", prompts)

    def parts(
        self, images: Images, prompts: Sequence[str | None] | None = None
    ) -> dict[str, Tensor]:
        """Return the scores of each reward by its name, shape (N,) each, before weights.

        What a reward returns in a tensor of floats keeps its dtype; all else becomes float64.
        """
        last = next(reversed(self.rewards))
        return {
            name: scores_of(reward(images if name == last else _kept(images), prompts), name)
            for name, reward in self.rewards.items()
        }

    def __call__(self, images: Images, prompts: Sequence[str | None] | None = None) -> Tensor:
        """Return the scores, shape (N,)."""
        return self._of_parts(self.parts(images, prompts), prompts)

    def _of_parts(
        self, parts: Mapping[str, Tensor], prompts: Sequence[str | None] | None
    ) -> Tensor:
        """Return the scores of images of any prompts, shape (N,), by those of the rewards."""
        return self.joined(parts)

    def joined(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the scores of images of which the parts are known, shape (N,) or (P, K).

        Args:
            parts: What `parts` returned, shape (N,) each; or (P, K), a row for each prompt.
        """
        scores = [parts[name] for name in self.rewards]
        shapes = {tuple(score.shape) for score in scores}
        if len(shapes) > 1:
            raise ValueError(
                f"rewards returned shapes {sorted(shapes)}; expected one score per image from each"
            )
        dtype = reduce(torch.promote_types, [score.dtype for score in scores])
        device = device_for(dtype, scores[0].device)
        return self._joined([score.to(device) for score in scores])

    def _weighed(self, scores: list[Tensor]) -> Tensor:
        """Return w_i r_i, the rewards in the first dimension."""
        return torch.stack(
            [weight * score for weight, score in zip(self.weights, scores, strict=True)]
        )

    @abstractmethod
    def _joined(self, scores: list[Tensor]) -> Tensor:
        """Join the scores of the rewards, shape (N,) each, to one score per image."""


def _kept(images: Images) -> Images:
    """Return images that a reward may write into, so that the next one sees them as they were."""
    return images.clone() if isinstance(images, Tensor) else images


def _name(reward: Reward) -> str:
    """Return what a reward is called among the parts; one of a single reward names that."""
    name = getattr(reward, "__name__", type(reward).__name__)
    if isinstance(reward, _Composed) and len(reward.rewards) == 1:
        return f"{name}({next(iter(reward.rewards))})"
    return name


def scores_of(returned: Any, name: str) -> Tensor:
    """Return what a reward returned as a tensor of floats.

    Numbers of Python and integers become float64, so that none is rounded, and none is turned by
    the arithmetic of bytes.

    Raises:
        ValueError: if the reward returned None.
    """
    if returned is None:
        raise ValueError(f"{name} returned None; expected one score per image: return them")
    if not isinstance(returned, Tensor):
        return torch.as_tensor(returned, dtype=torch.float64, device="cpu")
    if returned.is_floating_point():
        return returned
    return returned.to(device_for(torch.float64, returned.device)).double()


class Sum(_Composed):
    """Σ w_i r_i.

    The `reward_scale` of the sum is 1, like that of any function. Pass the steerer a scale, or
    standardise the rewards and weigh them.

    Args:
        rewards: Rewards, each a callable of images and prompts.
        weights: One per reward; 1 each if None.

    Raises:
        ValueError: if there is not one weight per reward.

    Example:
        >>> import torch
        >>> from glassflows.rewards import Negate, Sum
        >>> redness = lambda images, prompts: images[:, 0].mean((1, 2))
        >>> blueness = lambda images, prompts: images[:, 2].mean((1, 2))
        >>> reward = Sum(redness, Negate(blueness), weights=[1, 0.5])
        >>> reward(torch.ones(2, 3, 4, 4), ["a rose", "a poppy"])
        tensor([0.5000, 0.5000])
    """

    def _joined(self, scores: list[Tensor]) -> Tensor:
        return self._weighed(scores).sum(0)


class Product(_Composed):
    """Π r_i^w_i.

    Args:
        rewards: Rewards, each a callable of images and prompts.
        weights: Exponents, one per reward; 1 each if None.

    Raises:
        ValueError: if there is not one weight per reward; at a call, if a score below 0 has a
            weight other than 1.
    """

    def _joined(self, scores: list[Tensor]) -> Tensor:
        for name, weight, score in zip(self.rewards, self.weights, scores, strict=True):
            if weight != 1 and (score < 0).any():
                raise ValueError(
                    f"{name} returned {float(score.min()):.4g}, which has no power {weight:g}: "
                    "give it the weight 1, or add to it what makes it positive"
                )
        factors = [
            score if weight == 1 else score**weight
            for weight, score in zip(self.weights, scores, strict=True)
        ]
        return torch.stack(factors).prod(0)


class Minimum(_Composed):
    """min_i w_i r_i: an image is as good as the worst of its scores.

    Rewards of different units are to be standardised, or the smallest one decides. The gradient is
    that of the worst score alone.

    Args:
        rewards: Rewards, each a callable of images and prompts.
        weights: One per reward; 1 each if None.

    Raises:
        ValueError: if there is not one weight per reward.

    Reference:
        Coste et al., arXiv:2310.02743 (worst-case ensembles of rewards).
    """

    def _joined(self, scores: list[Tensor]) -> Tensor:
        return self._weighed(scores).amin(0)


class Ranked(_Composed):
    """Σ w_i (rank of r_i among the images of the prompt), so that units do not matter.

    The rank of the lowest score is 0 and that of the highest 1, ties share the mean of theirs, and
    a single image has .5. Scores are between 0 and Σ w_i, and `reward_scale` is 8 / Σ |w_i|. They
    tell which of some images are better, and not by how much: a steerer that moves particles by
    them samples from no fixed law, and its evidence has no meaning. They have no gradient.

    A steerer ranks all particles of a prompt, however few are scored at a time.

    Args:
        rewards: Rewards, each a callable of images and prompts.
        weights: One per reward; 1 each if None.

    Raises:
        ValueError: if there is not one weight per reward, or one of the rewards is `Ranked`; at a
            call, if a score is not finite, or there is not one prompt for each image.

    Example:
        >>> import torch
        >>> from glassflows.rewards import Ranked
        >>> redness = lambda images, prompts: images[:, 0].mean((1, 2))
        >>> blueness = lambda images, prompts: -1000 * images[:, 2].mean((1, 2)) ** 2
        >>> reward = Ranked(redness, blueness, weights=[1, 0.5])
        >>> images = torch.linspace(0, 1, 3).view(3, 1, 1, 1).expand(3, 3, 4, 4)
        >>> reward(images, ["a rose"] * 3)
        tensor([0.5000, 0.7500, 1.0000])
    """

    in_groups = True

    def _usual_scale(self) -> float:
        return 8.0 / (sum(map(abs, self.weights)) or 1.0)

    def _of_parts(
        self, parts: Mapping[str, Tensor], prompts: Sequence[str | None] | None
    ) -> Tensor:
        number = len(next(iter(parts.values())))
        texts = one_each(prompts or [None] * number, number)
        scores = torch.empty(number)
        for first, text in enumerate(texts):
            same = [i for i, other in enumerate(texts) if other == text]
            if same[0] < first:  # it has been ranked; a prompt may be a dict, which has no hash
                continue
            group = self.joined({name: part[same] for name, part in parts.items()})
            scores = scores.to(group)
            scores[same] = group
        return scores

    def _joined(self, scores: list[Tensor]) -> Tensor:
        for name, score in zip(self.rewards, scores, strict=True):
            if not score.isfinite().all():
                raise ValueError(
                    f"{name} returned {score.tolist()}; expected finite scores, which have ranks: "
                    "check the images it was given"
                )
        return self._weighed([_ranks(score.detach()) for score in scores]).sum(0)


def _ranks(scores: Tensor) -> Tensor:
    """Return the ranks of scores (…, K) in their row, from 0 to 1."""
    one, other = scores[..., :, None], scores[..., None, :]
    below, alike = (one > other).sum(-1), (one == other).sum(-1) - 1
    number = scores.shape[-1]
    if number == 1:
        return torch.full_like(scores, 0.5)
    return (below + alike / 2).to(scores) / (number - 1)


class OfOne(_Composed):
    """A reward made of a single one, whose `reward_scale` it has unless it says otherwise."""

    def __init__(self, reward: Reward) -> None:
        super().__init__(reward)

    def _usual_scale(self) -> float:
        (reward,) = self.rewards.values()
        scale = getattr(reward, "reward_scale", None)  # a function has none, and counts as 1
        return 1.0 if scale is None else float(scale)

    def _joined(self, scores: list[Tensor]) -> Tensor:
        return scores[0]


class Standardize(OfOne):
    """(r − mean) / std, so that rewards of different units can be added.

    Args:
        reward: A callable of images and prompts.
        mean: Mean of the reward over images like those to be scored.
        std: Standard deviation of the reward over such images.

    Raises:
        ValueError: if `std` is not positive.
    """

    def __init__(self, reward: Reward, *, mean: float, std: float) -> None:
        super().__init__(reward)
        if not std > 0:
            raise ValueError(
                f"std: expected a positive number, got {std}: the reward must tell images apart"
            )
        self.mean, self.std = float(mean), float(std)

    def _usual_scale(self) -> float:
        return super()._usual_scale() * self.std  # λ r scatters as before

    @classmethod
    def fitted(
        cls, reward: Reward, images: Images, prompts: Sequence[str | None] | None = None
    ) -> Standardize:
        """Return the reward with mean 0 and standard deviation 1 over some images."""
        scores = scores_of(reward(images, prompts), "reward").detach().cpu().double()
        return cls(reward, mean=float(scores.mean()), std=float(scores.std()))

    def _joined(self, scores: list[Tensor]) -> Tensor:
        return (scores[0] - self.mean) / self.std


class Negate(OfOne):
    """−r, with the same `reward_scale`.

    Args:
        reward: A callable of images and prompts.
    """

    def _joined(self, scores: list[Tensor]) -> Tensor:
        return -scores[0]
