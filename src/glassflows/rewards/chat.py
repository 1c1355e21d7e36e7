"""ChatReward: a vision-language model behind a server that speaks the chat API of OpenAI.

vLLM, SGLang, llama.cpp, OpenAI and others do. A model that one holds oneself is `VLMReward`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..caller import warn
from .http import RemoteRewardError, Service
from .images import Images
from .remote import Format, as_pictures, listed, packed
from .vlm import QUESTION

_REFUSED = (400, 403, 422, 501)  # statuses by which servers refuse log-probabilities
_NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)")
_SCALE = re.compile(r"(?:/|out of)\s*\d+(?:\.\d+)?")  # of "7/10", which is 7


class ChatReward:
    """What a model answers to a question about each image, on a server of OpenAI's chat API.

    Where the server gives log-probabilities the score is P(yes) / (P(yes) + P(no)) of the first
    token, whatever case and spaces it is written in. Where it does not, it is asked in words from
    then on, with one warning: "yes" is 1, and "no" is 0. A question may as well ask for a number
    (`numbers=True`), which counts as it is; the log-probabilities are then not asked for.

    Images go as PNG, one message each, and the frames of a video as several images of a message.
    There is no gradient. Prompts are text to the server; what its chat template makes of control
    tokens in them is its own.

    Args:
        base_url: Address of the API, such as "http://localhost:8000/v1".
        model: Name of the model on the server.
        question: Question about each image; {prompt} stands for the prompt.
        numbers: Whether the answer is a number.
        answers: The answer that counts 1 and the one that counts 0, of one word each.
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
        retries: int = 7,
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
        if len(answers) != 2 or not all(re.fullmatch(r"\w+", one) for one in answers):
            raise ValueError(
                f"answers: expected two words, got {answers!r}: their first token counts"
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

    def __call__(
        self, images: Images | Tensor, prompts: Sequence[Any] | str | None = None
    ) -> Tensor:
        """Return the scores of images or videos, shape (N,), float64 on the CPU.

        Args:
            images: Float tensor (N, 3, H, W) or (N, frames, 3, H, W) in [0, 1], or PIL images.
            prompts: One for each; None where the question does not have them.

        Raises:
            ValueError: if images require a gradient, or images or prompts are not as above.
            RemoteRewardError: if the server does not answer well.
        """
        pictures = as_pictures(images, self)
        texts = listed(prompts, len(pictures))
        self.check_prompts(texts)
        scores = self._asked(pictures, texts)
        return torch.tensor(scores, dtype=torch.float64, device="cpu")

    def check_prompts(self, prompts: Sequence[Any]) -> None:
        """Check prompts before images are drawn of them.

        Raises:
            ValueError: if one of them is none, and the question has it.
        """
        if "{prompt}" in self.question and any(one is None for one in prompts):
            raise ValueError(
                "prompts: expected texts, which the question repeats, got None: pass prompts, or a "
                "question without {prompt}"
            )

    def _asked(self, pictures: Sequence[Any], prompts: Sequence[Any]) -> list[float]:
        if self._weighs:
            try:
                scores = self._answers(pictures, prompts, weighs=True)
            except RemoteRewardError as error:
                if error.status not in _REFUSED or "logprob" not in str(error).lower():
                    raise
            else:
                if None not in scores:
                    return scores
        scores = self._answers(pictures, prompts, weighs=False)
        if self._weighs:
            self._weighs = False
            warn(
                f"{self!r} gives no log-probabilities: it is asked in words, and scores are 0 or 1"
            )
        return scores

    def _answers(
        self, pictures: Sequence[Any], prompts: Sequence[Any], *, weighs: bool
    ) -> list[Any]:
        """Return the scores of pictures, None where there are no log-probabilities to weigh."""
        bodies = [
            self._request(picture if isinstance(picture, list) else [picture], prompt, weighs)
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        read = self._weighed if weighs else self._worded
        return self.service.every(bodies, read, "/chat/completions")

    def _request(self, frames: list[Any], prompt: Any, weighs: bool) -> dict[str, Any]:
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
            **(weighing if weighs else {"max_tokens": 16}),
            **self.body,
        }
        return {name: value for name, value in request.items() if value is not None}

    def _weighed(self, answer: Any) -> float | None:
        """Return P(yes) / (P(yes) + P(no)) of the first token; None if it is not told.

        Raises:
            RemoteRewardError: if it is neither.
        """
        content = (answer["choices"][0].get("logprobs") or {}).get("content")
        tokens = content[0].get("top_logprobs") if content else None
        if not tokens:
            return None
        chances = [0.0, 0.0]
        for token in tokens:
            for i, word in enumerate(self.answers):
                if token["token"].strip().lower() == word.lower():
                    chances[i] += math.exp(token["logprob"])
        if not sum(chances) > 0:
            self._fail(" first", ", ".join(repr(token["token"]) for token in tokens[:5]))
        return chances[0] / sum(chances)

    def _worded(self, answer: Any) -> float:
        """Return the score of an answer in words.

        Raises:
            RemoteRewardError: if it has none.
        """
        text = str(answer["choices"][0]["message"]["content"] or "")
        if self.numbers:
            plain = re.sub(r",(?=\d{3}\b)", "", text.replace("\N{MINUS SIGN}", "-"))
            plain = _SCALE.sub(" ", re.sub(r"(?<=\d),(?=\d)", ".", plain))
            numbers = set(_NUMBER.findall(plain))
            if len(numbers) != 1 or not math.isfinite(number := float(numbers.pop())):
                self._fail("", repr(text))
            return number
        words = re.findall(r"\w+", text.lower())
        said = [word.lower() in words for word in self.answers]
        if sum(said) != 1:
            self._fail("", repr(text))
        return float(said[0])

    def _fail(self, where: str, got: str) -> NoReturn:
        wanted = "one number" if self.numbers else " or ".join(self.answers)
        raise RemoteRewardError(
            f"{self!r}: expected {wanted}{where}, got {got:.200}: ask for it in the question"
        )
