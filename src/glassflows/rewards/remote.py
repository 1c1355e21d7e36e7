"""RemoteReward: a reward that a server computes, over HTTP.

The protocol has two requests. GET tells what is offered, {"reward": name, "reward_scale": λ}. POST
/score takes {"images": [picture, …], "prompts": [text or null, …]} and answers {"scores": [number,
…]}. A picture is PNG or JPEG in base64; a video is a list of such. `glassflows serve` offers any
reward so.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from .adapters import as_reward
from .http import Service

Format = Literal["png", "jpeg"]


class RemoteReward:
    """Scores that a server computes: of `glassflows serve`, or of one's own with its protocol.

    The server sees pictures of bytes: a PNG is what the image is to 1/255, a JPEG (quality 95) is
    smaller and loses more. There is no gradient.

    Args:
        url: Address of the server, such as "http://judge:8000".
        format: "png" or "jpeg".
        batch_size: Images of a request.
        concurrency: Requests under way at a time, of all threads.
        timeout: Seconds to wait for a connection, and for each piece of an answer.
        retries: Attempts after one that failed: no connection, no answer in time, half an answer,
            garbage, or a status that says busy or broken (408, 409, 425, 429, 5xx).
        backoff: Seconds before the second attempt; each further one waits twice as long, or as the
            server asks for by Retry-After, but a minute at most. The defaults outlast a restart of
            half a minute.
        headers: Sent with each request, such as {"Authorization": "Bearer …"}; shown nowhere.
        reward_scale: λ_r of a steerer that is given none; None for what the server says when the
            reward is loaded, as a steerer does.

    Raises:
        ValueError: if an option is out of range; at a call, if images require a gradient, or are
            sound.
        RemoteRewardError: at a call, if the server does not answer well, as often as it is asked.

    Example:
        >>> from glassflows.rewards import RemoteReward
        >>> RemoteReward("http://judge:8000", headers={"Authorization": "Bearer 1234"})
        RemoteReward('http://judge:8000')
    """

    def __init__(
        self,
        url: str,
        *,
        format: Format = "png",
        batch_size: int = 8,
        concurrency: int = 4,
        timeout: float = 60.0,
        retries: int = 6,
        backoff: float = 0.5,
        headers: Mapping[str, str] | None = None,
        reward_scale: float | None = None,
    ) -> None:
        if format not in get_args(Format):
            raise ValueError(f"format: expected one of {get_args(Format)}, got {format!r}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected a whole number from 1, got {batch_size!r}")
        self.service = Service(
            url.rstrip("/"),
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            concurrency=concurrency,
            headers=headers,
            owner=type(self).__name__,
        )
        self.format: Format = format
        self.batch_size = batch_size
        self.reward_scale = 1.0 if reward_scale is None else float(reward_scale)
        self._asks_for_scale = reward_scale is None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.service.shown!r})"

    def load(self) -> Self:
        """Ask the server what it offers, unless `reward_scale` was given; return the reward itself.

        Raises:
            RemoteRewardError: if it does not answer well.
        """
        if self._asks_for_scale:
            self.reward_scale = self.service.get(lambda answer: float(answer["reward_scale"]))
            self._asks_for_scale = False
        return self

    def __call__(self, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        """Return the scores of images (N, 3, H, W) or videos (N, F, 3, H, W), shape (N,), float64.

        Raises:
            ValueError: if images require a gradient, or are sound.
            RemoteRewardError: if the server does not answer well.
        """
        return as_reward(self._scores)(without_gradient(images, self), list(prompts))

    def _scores(self, pictures: Sequence[Any], prompts: Sequence[Any]) -> Tensor:
        parts = [slice(i, i + self.batch_size) for i in range(0, len(pictures), self.batch_size)]
        bodies = [
            {
                "images": [packed(one, self.format) for one in pictures[part]],
                "prompts": [None if one is None else str(one) for one in prompts[part]],
            }
            for part in parts
        ]
        scores: list[float] = []
        numbers = [len(body["images"]) for body in bodies]
        for number, answer in zip(
            numbers, self.service.every(bodies, _checked, "/score"), strict=True
        ):
            if len(answer) != number:
                raise ValueError(
                    f"{self!r} answered {len(answer)} scores of {number} images: expected one each"
                )
            scores += answer
        return torch.tensor(scores, dtype=torch.float64, device="cpu")


def _checked(answer: Any) -> list[float]:
    """Return the scores of an answer.

    Raises:
        ValueError, LookupError, TypeError: if there are none.
    """
    scores = [float(one) for one in answer["scores"]]
    if not all(math.isfinite(one) for one in scores):
        raise ValueError("expected finite scores")
    return scores


def without_gradient(images: Any, reward: Any) -> Tensor:
    """Return images that are a tensor without gradient.

    Raises:
        ValueError: if they are not.
    """
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images: expected a tensor (N, 3, H, W), got {type(images).__name__}: make one of "
            "pictures, torchvision's or diffusers' VaeImageProcessor does"
        )
    if images.requires_grad:
        raise ValueError(
            f"images require a gradient; {type(reward).__name__} has none: detach them"
        )
    return images


def packed(picture: Any, format: Format) -> Any:
    """Return a PIL image in base64, a list of them for a video."""
    if isinstance(picture, list):
        return [packed(frame, format) for frame in picture]
    buffer = io.BytesIO()
    picture.save(buffer, format, **({"quality": 95} if format == "jpeg" else {}))
    return base64.b64encode(buffer.getvalue()).decode()


def unpacked(text: Any) -> Any:
    """Return what was packed, images of mode RGB.

    Raises:
        ValueError: if it is no picture.
    """
    if isinstance(text, list):
        return [unpacked(frame) for frame in text]
    try:
        content = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(content), formats=["PNG", "JPEG"]) as file:
            return file.convert("RGB")
    except (binascii.Error, TypeError, OSError, Image.DecompressionBombError) as error:
        raise ValueError("images: expected PNG or JPEG in base64") from error
