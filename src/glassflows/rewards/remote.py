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

from .http import Service, check_whole
from .images import Images, as_tensors, pictures_of
from .model import one_each

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
            garbage, or a status that says busy or broken (408, 409, 425, 429, 500, 502, 503, 504).
        backoff: Seconds before the second attempt; each further one waits twice as long, or longer
            if the server asks for it by Retry-After, but a minute at most. The defaults outlast a
            restart of half a minute.
        headers: Sent with each request, such as {"Authorization": "Bearer …"}; shown nowhere.
        reward_scale: λ_r of a steerer that is given none; None for what the server says when the
            reward is loaded, as a steerer does.

    Raises:
        ValueError: if an option is out of range; at a call, if images require a gradient, are not
            as for other rewards, or there is not one prompt for each.
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
        retries: int = 7,
        backoff: float = 0.5,
        headers: Mapping[str, str] | None = None,
        reward_scale: float | None = None,
    ) -> None:
        if format not in get_args(Format):
            raise ValueError(f"format: expected one of {get_args(Format)}, got {format!r}")
        check_whole("batch_size", batch_size, 1)
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
        self._reward_scale = reward_scale
        self._told_scale: float | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.service.shown!r})"

    def load(self) -> Self:
        """Ask the server what it offers, unless `reward_scale` was given; return the reward itself.

        Raises:
            RemoteRewardError: if it does not answer well.
        """
        if self._reward_scale is None and self._told_scale is None:
            self._told_scale = self.service.get(lambda answer: float(answer["reward_scale"]))
        return self

    @property
    def reward_scale(self) -> float:
        """λ_r of a steerer that is given none; 1 until the server has told its own."""
        scales = (self._reward_scale, self._told_scale, 1.0)
        return next(float(scale) for scale in scales if scale is not None)

    @reward_scale.setter
    def reward_scale(self, scale: float) -> None:
        self._reward_scale = scale

    def __call__(
        self, images: Images | Tensor, prompts: Sequence[Any] | str | None = None
    ) -> Tensor:
        """Return the scores of images or videos, shape (N,), float64 on the CPU.

        Args:
            images: Float tensor (N, 3, H, W) or (N, frames, 3, H, W) in [0, 1], or PIL images.
            prompts: One for each; None for a reward that needs none.

        Raises:
            ValueError: if images require a gradient, or images or prompts are not as above.
            RemoteRewardError: if the server does not answer well.
        """
        pictures = as_pictures(images, self)
        texts = listed(prompts, len(pictures))
        bodies = [
            {
                "images": [packed(picture, self.format) for picture in pictures[part]],
                "prompts": texts[part],
            }
            for part in _alike(pictures, self.batch_size)
        ]
        scores: list[float] = []
        for body, answer in zip(
            bodies, self.service.every(bodies, _checked, "/score"), strict=True
        ):
            if len(answer) != len(body["images"]):
                raise ValueError(
                    f"{self!r} answered {len(answer)} scores of {len(body['images'])} images: "
                    "expected one each"
                )
            scores += answer
        return torch.tensor(scores, dtype=torch.float64, device="cpu")


def _checked(answer: Any) -> list[float]:
    """Return the scores of an answer.

    Raises:
        ValueError, LookupError, TypeError: if there are none.
    """
    scores = answer["scores"]
    if not isinstance(scores, list) or not all(type(one) in (int, float) for one in scores):
        raise ValueError("expected a list of numbers as scores")
    if not all(math.isfinite(one) for one in scores):
        raise ValueError("expected finite scores")
    return [float(one) for one in scores]


def as_pictures(images: Images | Tensor, reward: Any) -> list[Any]:
    """Return images as PIL images, and videos as lists of them.

    Raises:
        ValueError: if they are no images or videos in [0, 1], or require a gradient.
    """
    if not isinstance(images, Tensor):
        return [picture for some in as_tensors(images) for picture in pictures_of(some, reward)]
    if images.ndim != 5:
        return pictures_of(as_tensors(images)[0], reward)
    frames = pictures_of(as_tensors(images.flatten(0, 1))[0], reward)
    length = images.shape[1]
    return [frames[i : i + length] for i in range(0, len(frames), length)]


def listed(prompts: Sequence[Any] | str | None, number: int) -> list[str | None]:
    """Return the prompt of each image, None where there is none.

    Raises:
        ValueError: if there is not one for each.
    """
    texts = one_each(prompts or [None] * number, number)
    return [None if text is None else str(text) for text in texts]


def _alike(pictures: Sequence[Any], most: int) -> list[slice]:
    """Return how pictures are split into parts of at most so many, each of one size."""
    sizes = [(len(one), one[0].size) if isinstance(one, list) else one.size for one in pictures]
    parts, first = [], 0
    for i in range(1, len(pictures) + 1):
        if i == len(pictures) or i - first == most or sizes[i] != sizes[first]:
            parts.append(slice(first, i))
            first = i
    return parts


def packed(picture: Any, format: Format) -> Any:
    """Return a PIL image in base64, a list of them for a video."""
    if isinstance(picture, list):
        return [packed(frame, format) for frame in picture]
    buffer = io.BytesIO()
    picture.save(buffer, format, **({"quality": 95} if format == "jpeg" else {}))
    return base64.b64encode(buffer.getvalue()).decode()


def unpacked(pictures: list[Any], most: int) -> list[list[Image.Image]]:
    """Return the frames of what was packed, of mode RGB: one of an image, those of a video.

    Args:
        pictures: What was packed.
        most: Pixels that all of them may have, which are counted before they are decoded.

    Raises:
        ValueError: if some of them are no pictures, or have more pixels.
    """
    try:
        films = [
            [_opened(frame) for frame in (one if isinstance(one, list) else [one])]
            for one in pictures
        ]
        pixels = sum(frame.width * frame.height for film in films for frame in film)
        if pixels > most:
            raise ValueError(
                f"images: expected at most {most} pixels in a request, got {pixels}: send fewer at "
                "a time, RemoteReward(…, batch_size=1)"
            )
        return [[frame.convert("RGB") for frame in film] for film in films]
    except (binascii.Error, TypeError, OSError, Image.DecompressionBombError) as error:
        raise ValueError("images: expected PNG or JPEG in base64") from error


def _opened(text: Any) -> Image.Image:
    """Return a picture of which nothing but the size has been read."""
    content = base64.b64decode(text, validate=True)
    return Image.open(io.BytesIO(content), formats=["PNG", "JPEG"])
