"""Rewards that ask a vision-language model what VQAScore and GenEval 2 ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .clip_t5 import CLIPT5, MODEL_TYPE
from .vlm import VLMReward

Question = str | tuple[str, str]
Aggregate = Literal["geometric", "mean"]

VQA_QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class VQAScore(VLMReward):
    """P("Yes") to whether the image shows the prompt, by CLIP-FlanT5 or a model of transformers.

    Scores are 0 to 1, and `reward_scale` is 10 (a guess). Published means over models of images are
    .67 (SD 2.1) to .78 (DALL-E 3) by CLIP-FlanT5-XXL. The model decides what is computed:

    - CLIP-FlanT5 (config.json of type "clip_t5") is read by the library itself, with its own system
      message. As published the score is (P(Yes) P(end | Yes))^½. It is differentiable in a tensor.
    - Any other vision-language model is asked in the words of its chat template, and the score is
      P("Yes") among all first tokens, without a gradient. The published code asks Qwen-VL and
      Gemma 'Does this figure show "{prompt}"? Please answer Yes or No.'.

    Args:
        model: Name or folder; zhiqiulin/clip-flant5-xl (3 B) if None. The published scores are of
            zhiqiulin/clip-flant5-xxl (11 B, 22 GB in bfloat16, as it was run).
        question: Question about each image; {prompt} stands for the prompt.
        answer: The answer.
        tokenizer: Of CLIP-FlanT5, google/flan-t5-xl if None.
        vision: Vision model of CLIP-FlanT5; None for the one in its config.
        device: Device of the model; None for the accelerator, if there is one.
        dtype: Floating point type of the model.

    Raises:
        ValueError: as `VLMReward` does.

    Reference:
        Lin et al., arXiv:2404.01291.
    """

    default = "zhiqiulin/clip-flant5-xl"
    default_tokenizer = "google/flan-t5-xl"
    offline = "VQAScore.from_pretrained('/model', tokenizer='/flan-t5', vision='/clip')"

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        question: str = VQA_QUESTION,
        answer: str = "Yes",
        tokenizer: str | Path | None = None,
        vision: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            model or self.default, question=question, answer=answer, device=device, dtype=dtype
        )
        self.tokenizer = str(tokenizer or self.default_tokenizer)
        self.vision = None if vision is None else str(vision)

    def _read(self) -> dict[str, nn.Module]:
        from transformers import PretrainedConfig

        settings, _ = PretrainedConfig.get_config_dict(self.name)
        if settings.get("model_type") == MODEL_TYPE:
            return {"clip_t5": CLIPT5(self.name, self.vision, self.tokenizer, self.dtype)}
        return super()._read()

    def _scores(self, images: Tensor, texts: list[str]) -> Tensor:
        if "clip_t5" not in (self.networks or {}):
            return super()._scores(images, texts)
        questions = [self.question.replace("{prompt}", text) for text in texts or [""]]
        if len(questions) < len(images):  # a question without the prompt is asked of every image
            questions *= len(images)
        return self._network("clip_t5")(images, questions, self.answer).to(self.exact)


class QuestionScore(VLMReward):
    """How likely the right answers to several questions about each image are (Soft-TIFA).

    A vision-language model of transformers is asked each question by itself, "… Answer in one
    word.", and the chance of the right answer is that of all first tokens it may begin with: with
    and without a space before it, small and capital, and of a number up to nine its figure. The
    score is the geometric mean of the chances, or their mean; both are 0 to 1. One wrong answer
    pulls the first down to nearly 0, as GenEval 2 judges whole prompts, and takes its share of the
    second, as it judges their parts. `reward_scale` is 5 (a guess). There is no gradient.

    Args:
        model: Name or folder of a vision-language model of transformers (GenEval 2 takes
            Qwen/Qwen3-VL-8B-Instruct).
        questions: A function of a prompt that returns its questions, a mapping of prompts to
            questions, or the questions of all prompts. A question is a text, whose answer is Yes,
            or (text, answer): ("How many cats are in the image?", "two").
        aggregate: "geometric" or "mean".
        instruction: Follows each question.
        device: Device of the model; None for the accelerator, if there is one.
        dtype: Floating point type of the model.

    Raises:
        ValueError: if `aggregate` is neither; at a call, as `VLMReward` does, or if a prompt has no
            questions, or what it has is no list of them.

    Reference:
        Kamath et al., arXiv:2512.16853 (GenEval 2).
    """

    reward_scale = 5.0
    offline = "QuestionScore.from_pretrained('/model', questions=…)"

    def __init__(
        self,
        model: str | Path,
        *,
        questions: Callable[[str], list[Question]] | Mapping[str, list[Question]] | list[Question],
        aggregate: Aggregate = "geometric",
        instruction: str = "Answer in one word.",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, question="{prompt}", device=device, dtype=dtype)
        if aggregate not in get_args(Aggregate):
            raise ValueError(f"aggregate: expected one of {get_args(Aggregate)}, got {aggregate!r}")
        self.questions = questions
        self.aggregate = aggregate
        self.instruction = instruction
        self.needs_prompts = callable(questions) or isinstance(questions, Mapping)

    def questions_of(self, prompt: str) -> list[tuple[str, str]]:
        """Return the questions of a prompt with their answers.

        Raises:
            ValueError: if there are none.
        """
        given: Any = self.questions
        if callable(given):
            given = given(prompt)
        elif isinstance(given, Mapping):
            given = given.get(prompt, [])
        if not (isinstance(given, list) and given and all(map(_is_question, given))):
            raise ValueError(
                f"questions: expected a list of texts, or of (text, answer), and at least one for "
                f"the prompt {prompt!r}, got {given!r}"
            )
        return [(one, "Yes") if isinstance(one, str) else (one[0], str(one[1])) for one in given]

    def _check_texts(self, texts: list[str]) -> None:
        asked = [one for text in dict.fromkeys(texts or [""]) for one in self.questions_of(text)]
        super()._check_texts([self._question(question) for question, _ in asked])

    def _question(self, question: str) -> str:
        return f"{question} {self.instruction}".strip()

    def chances(self, images: Tensor, prompts: Sequence[str]) -> list[Tensor]:
        """Return the chances of the right answers to the questions of each image, in their order.

        Args:
            images: Shape (N, 3, H, W), in [0, 1].
            prompts: One for each image.
        """
        self.load()
        asked = [self.questions_of(prompt) for prompt in prompts]
        rows = [i for i, every in enumerate(asked) for _ in every]
        flat = [one for every in asked for one in every]
        found = []
        for start in range(0, len(flat), self.batch_size):
            part = slice(start, start + self.batch_size)
            texts = [self._question(question) for question, _ in flat[part]]
            answers = [spellings(answer) for _, answer in flat[part]]
            found.append(self._chances(images[rows[part]], texts, answers))
        return list(torch.cat(found).split([len(every) for every in asked]))

    def _scores(self, images: Tensor, texts: list[str]) -> Tensor:
        every = self.chances(images, texts or [""] * len(images))
        if self.aggregate == "mean":
            return torch.stack([chances.mean() for chances in every])
        return torch.stack([chances.log().mean().exp() for chances in every])


def _is_question(one: Any) -> bool:
    """Return whether something is a question, or one with its answer."""
    if isinstance(one, str):
        return True
    return isinstance(one, (tuple, list)) and len(one) == 2 and isinstance(one[0], str)


def spellings(answer: str) -> tuple[str, ...]:
    """Return how an answer may be written: small, with a capital, and of a number its figure."""
    word = answer.strip().lower()
    ways = [answer.strip(), word, word.capitalize()]
    if word in _NUMBERS:
        ways.append(str(_NUMBERS.index(word)))
    elif word in map(str, range(10)):
        ways += [_NUMBERS[int(word)], _NUMBERS[int(word)].capitalize()]
    return tuple(dict.fromkeys(ways))
