"""Videos, scored by some of their frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from .compose import OfOne, Reward, scores_of
from .images import Images
from .model import one_each

Reduce = Literal["mean", "min"]


class Frames(OfOne):
    """mean_f r(x_f) or min_f r(x_f) of a reward r of images, over some frames x_f of a video.

    The frames are evenly spaced, the first and the last among them; one frame is the middle one. A
    video of fewer frames is scored by all it has. Images are scored as by the reward itself, and
    `reward_scale` is the reward's. The scores are differentiable in a tensor if the reward is; the
    gradient of the minimum is that of the worst frame alone.

    Args:
        reward: A callable of images and prompts.
        frames: How many frames of each video are scored.
        reduce: "mean", or "min", by which a video is as good as the worst of its frames.

    Raises:
        ValueError: if `frames` is not positive, `reduce` is neither, or the reward compares images,
            as `Ranked` does; at a call, if a tensor of five dimensions is no videos (N, frames, 3,
            H, W), or the reward does not return one score per frame.

    Example:
        >>> import torch
        >>> from glassflows.rewards import Frames
        >>> redness = lambda images, prompts: images[:, 0].mean((1, 2))
        >>> videos = torch.linspace(0, 1, 5).view(1, 5, 1, 1, 1).expand(2, 5, 3, 4, 4)
        >>> Frames(redness, frames=2)(videos, ["a sunrise", "a sunrise"])
        tensor([0.5000, 0.5000])
    """

    def __init__(self, reward: Reward, frames: int = 8, reduce: Reduce = "mean") -> None:
        super().__init__(reward)
        if frames < 1:
            raise ValueError(f"frames: expected a positive number, got {frames}")
        if reduce not in get_args(Reduce):
            raise ValueError(f"reduce: expected one of {get_args(Reduce)}, got {reduce!r}")
        self.frames = frames
        self.reduce = reduce

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, frames={self.frames}, reduce={self.reduce!r})"

    def parts(
        self, images: Images, prompts: Sequence[str | None] | str | None = None
    ) -> dict[str, Tensor]:
        """Return the scores of the videos by the reward's name, shape (N,).

        What the reward returns in a tensor of floats keeps its dtype; all else becomes float64.

        Args:
            images: Float tensor (N, frames, 3, H, W), or what the reward takes as images.
            prompts: One for each video; None for a reward that needs none.

        Raises:
            ValueError: if videos are not as above, there is not one prompt for each, or the reward
                does not return one score per frame.
        """
        [(name, reward)] = self.rewards.items()
        if not isinstance(images, Tensor) or images.ndim != 5:
            return {name: scores_of(reward(images, prompts), name)}
        if 0 in images.shape[:2] or images.shape[2] != 3:
            raise ValueError(
                f"images: expected videos (N, frames, 3, H, W), got {tuple(images.shape)}: "
                "put red, green and blue third, after the frames"
            )
        shown = images[:, picked(images.shape[1], self.frames)]
        number, frames = shown.shape[:2]
        scores = scores_of(reward(shown.flatten(0, 1), _repeated(prompts, number, frames)), name)
        if scores.shape != (number * frames,):
            raise ValueError(
                f"{name} returned shape {tuple(scores.shape)}; expected one score per frame, shape "
                f"({number * frames},): return one for each image it is given"
            )
        films = scores.unflatten(0, (number, frames))
        return {name: films.mean(1) if self.reduce == "mean" else films.min(1).values}


def picked(length: int, number: int) -> list[int]:
    """Return which of so many frames are scored, evenly spaced, the first and the last among them.

    Example:
        >>> from glassflows.rewards.frames import picked
        >>> picked(49, 4), picked(3, 8), picked(9, 1)
        ([0, 16, 32, 48], [0, 1, 2], [4])
    """
    if number >= length:
        return list(range(length))
    if number == 1:
        return [(length - 1) // 2]
    gaps = number - 1
    return [(2 * i * (length - 1) + gaps) // (2 * gaps) for i in range(number)]  # rounded


def _repeated(
    prompts: Sequence[str | None] | str | None, number: int, frames: int
) -> list[str | None] | None:
    """Return the prompt of each frame.

    Raises:
        ValueError: if there is not one for each video.
    """
    if prompts is None:
        return None
    return [text for text in one_each(prompts, number, "video") for _ in range(frames)]
