"""ChatReward: a vision-language model behind a server that speaks the chat API of OpenAI.

vLLM, SGLang, llama.cpp, OpenAI and others do. A model that one holds oneself is `VLMReward`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .adapters import as_reward
from .http import RemoteRewardError, Service
from .remote import Format, packed, without_gradient
from .vlm import QUESTION

_REFUSED = (400, 404, 422, 501)  # statuses by which servers refuse log-probabilities


class ChatReward:
    """What a model answers to a question about each image, on a server of OpenAI's chat API.

    Where the server gives log-probabilities the score is P(yes) / (P(yes) + P(no)) of the first
    token, whatever case and spaces it is written in. Where it does not, the answer is read: "yes"
    is 1, "no" is 0, and else its first number counts as it is. So a question may as well ask for a
    number (`numbers=True`): the log-probabilities are then not asked for.

    Images go as PNG, one message each, and the frames of a video as several images of a message.
    There is no gradient. Prompts are text to the server; what its chat template makes of control
    tokens in them is its own.

    Args:
        base_url: Address of the API, such as "http://localhost:8000/v1".
        model: Name of the model on the server.
        question: Question about each image; {prompt} stands for the prompt.
        numbers: Whether the answer is a number.
        answers: The answer that counts 1 and the one that counts 0.
        format: "png" or "jpeg".
        concurrency: Requests under way at a time, of all threads.
        timeout: Seconds to wait for a connection, and for each piece of an answer.
        retries: Attempts after one that failed; see `RemoteReward`.
        backoff: Seconds before the second attempt.
        api_key: Sent as a bearer token and shown nowhere; none is read from the environment.
        headers: Further headers.
        body: Further fields of each request, such as {"max_completion_tokens": 1, "max_tokens":
            None}; None leaves a field out.
        reward_scale: λ_r of a steerer that is given none.

    Raises:
        ValueError: if an option is out of range; at a call, if images require a gradient.
        RemoteRewardError: at a call, if the server does not answer well, as often as it is asked.

    Reference:
        Lin et al., arXiv:2404.01291 (VQAScore), there P(yes) alone.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        question: str = QUESTION,
        *,
        numbers: bool = False,
        answers: tuple[str, str] = ("Yes", "No"),
        format: Format = "png",
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 6,
        backoff: float = 0.5,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        reward_scale: float = 10.0,
    ) -> None:
        key = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self.service = Service(
            base_url.rstrip("/"),
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            concurrency=concurrency,
            headers={**key, **(headers or {})},
            owner=type(self).__name__,
        )
        self.model = model
        self.question = question
        self.numbers = numbers
        self.answers = answers
        self.format: Format = format
        self.body = dict(body or {})
        self.reward_scale = reward_scale
        self._weighs = not numbers  # by log-probabilities, until a server refuses them

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.service.shown!r}, {self.model!r})"

    def __call__(self, images: Tensor, prompts: Sequence[str | None]) -> Tensor:
        """Return the scores of images (N, 3, H, W) or videos (N, F, 3, H, W), shape (N,), float64.

        Raises:
            ValueError: if images require a gradient, or a prompt is none where the question has it.
            RemoteRewardError: if the server does not answer well.
        """
        if "{prompt}" in self.question and not all(isinstance(one, str) for one in prompts):
            raise ValueError(
                "prompts: expected texts, which the question repeats, got None: pass prompts, or a "
                "question without {prompt}"
            )
        scored = as_reward(self._scores)(without_gradient(images, self), list(prompts))
        return torch.tensor(scored, dtype=torch.float64, device="cpu")

    def _scores(self, pictures: Sequence[Any], prompts: Sequence[Any]) -> list[float]:
        try:
            return self._asked(pictures, prompts)
        except RemoteRewardError as error:
            if not self._weighs or error.status not in _REFUSED:
                raise
        self._weighs = False
        return self._asked(pictures, prompts)

    def _asked(self, pictures: Sequence[Any], prompts: Sequence[Any]) -> list[float]:
        bodies = [
            self._request(picture if isinstance(picture, list) else [picture], prompt)
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        return self.service.every(bodies, self._read, "/chat/completions")

    def _request(self, frames: list[Any], prompt: Any) -> dict[str, Any]:
        """Return the body of a request about an image, or the frames of a video."""
        kind = f"data:image/{self.format};base64,"
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": kind + packed(frame, self.format)}}
            for frame in frames
        ]
        question = self.question.replace("{prompt}", str(prompt))
        content.append({"type": "text", "text": question})
        weighing = {"logprobs": True, "top_logprobs": 20, "max_tokens": 1}
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            **(weighing if self._weighs else {"max_tokens": 16}),
            **self.body,
        }
        return {name: value for name, value in request.items() if value is not None}

    def _read(self, answer: Any) -> float:
        """Return the score of an answer.

        Raises:
            ValueError, LookupError, TypeError: if it has none.
        """
        choice = answer["choices"][0]
        weights = (choice.get("logprobs") or {}).get("content")
        if self._weighs and weights:
            return self._weighed(weights[0]["top_logprobs"])
        text = choice["message"]["content"]
        first = re.sub(r"\W", " ", text).split()[:1]
        yes, no = (one.lower() for one in self.answers)
        if not self.numbers and first and first[0].lower() in (yes, no):
            return float(first[0].lower() == yes)
        number = re.search(r"-?\d+(?:\.\d+)?", text)
        if number is None:
            raise ValueError(f"expected {' or '.join(self.answers)}, or a number, got {text!r}")
        return float(number[0])

    def _weighed(self, tokens: Sequence[Mapping[str, Any]]) -> float:
        """Return P(yes) / (P(yes) + P(no)) of the likeliest first tokens."""
        chances = [0.0, 0.0]
        for token in tokens:
            for i, answer in enumerate(self.answers):
                if token["token"].strip().lower() == answer.lower():
                    chances[i] += math.exp(token["logprob"])
        if not sum(chances) > 0:
            seen = ", ".join(repr(token["token"]) for token in tokens[:5])
            raise ValueError(f"expected {' or '.join(self.answers)} first, got {seen}")
        return chances[0] / sum(chances)
