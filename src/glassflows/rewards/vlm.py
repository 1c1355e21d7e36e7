"""A vision-language model that is asked a question about each image.

The score of an image is the probability of one answer to the question.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .images import pictures_of
from .model import ModelReward, in_dtype, with_words
from .qwen import processor_of

QUESTION = 'Does this image show "{prompt}"? Answer Yes or No.'


class VLMReward(ModelReward):
    """P(the answer begins with "Yes" | image, question), by a vision-language model.

    Scores are 0 to 1, and `reward_scale` is 10. They have no gradient in the images, because the
    model's processor works on pictures. The question is put in the words of the model's chat
    template, or after the model's image token if there is no template.

    Args:
        model: Name or folder of a vision-language model of transformers, with its processor.
        question: Question about each image; {prompt} stands for the prompt.
        answer: Answer whose first token is weighed against the whole vocabulary; the first tokens
            with and without a space before the answer both count.
        device: Device of the model; None for the accelerator, if there is one.
        dtype: Floating point type of the model.

    Raises:
        ValueError: at a call, if images require a gradient, the question or a prompt contains a
            control token of the model, such as <image>, or no token begins the answer.

    Reference:
        Lin et al., arXiv:2404.01291 (VQAScore).
    """

    reward_scale = 10.0
    files = "config.json, model.safetensors, and the files of its processor"
    offline = "VLMReward.from_pretrained('/model')"

    def __init__(
        self,
        model: str | Path,
        *,
        question: str = QUESTION,
        answer: str = "Yes",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, device=device, dtype=dtype)
        self.question = question
        self.answer = answer
        self.needs_prompts = "{prompt}" in question
        self.processor: Any = None
        self.language: Any = None  # configuration of the language model

    def _read(self) -> dict[str, nn.Module]:
        from transformers import AutoModelForImageTextToText

        self.processor = processor_of(self.name)
        tokenizer = with_words(self.processor.tokenizer, self.name)
        # read in its dtype, not cast: a model keeps some tensors in float32, like its rotary
        # frequencies
        vlm = AutoModelForImageTextToText.from_pretrained(self.name, **in_dtype(self.dtype))
        self.language = getattr(vlm.config, "text_config", vlm.config)
        # padded on the left, so that the next token is the last of every row; an encoder's
        # positions must not shift
        tokenizer.padding_side = "right" if self.language.is_encoder_decoder else "left"
        return {"vlm": vlm}

    def _scores(self, images: Tensor, texts: list[str]) -> Tensor:
        texts = texts or [""] * len(images)
        return self._chances(images, texts, [(self.answer,)] * len(images))

    def _chances(
        self, images: Tensor, texts: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> Tensor:
        """Return the chances that the model answers as it should, shape (N,), `exact`.

        Args:
            images: Shape (N, 3, H, W).
            texts: What stands for the prompt in the question about each image.
            answers: The ways in which the right answer to each question may be written.
        """
        pictures = pictures_of(images, self)
        for text in texts:
            self._check_words(text)
        asked = [self._asked(text) for text in texts]
        batch = self.processor(
            text=asked,
            images=[[one] for one in pictures],
            padding=True,
            return_tensors="pt",
            **begun(self.processor.tokenizer, asked[0]),
        )
        inputs = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in batch.items()
            if isinstance(value, Tensor) and name != "labels"  # PaliGemma's
        }
        vlm = self._network("vlm")
        if self.language.is_encoder_decoder:  # BLIP-2 with T5: the answer has a text of its own
            start = getattr(self.language, "decoder_start_token_id", None)
            start = self.language.pad_token_id if start is None else start
            inputs["decoder_input_ids"] = torch.full((len(pictures), 1), start, device=self.device)
            asked = [""] * len(pictures)
        named = inspect.signature(vlm.forward).parameters
        inputs |= {"logits_to_keep": 1} if "logits_to_keep" in named else {}
        logits = vlm(**inputs, use_cache=False).logits[:, -1].to(self.exact)
        chances = logits.softmax(-1)
        first: dict[tuple[str, ...], list[int]] = {}
        ways = [tuple(answer) for answer in answers]
        for question, answer in zip(asked, ways, strict=True):
            if answer not in first:
                first[answer] = self._first_tokens(question, answer)
        return torch.stack(
            [row[first[answer]].sum() for row, answer in zip(chances, ways, strict=True)]
        )

    def _check_texts(self, texts: list[str]) -> None:
        self.load()
        if self.processor is not None:  # CLIP-FlanT5 has no control tokens
            for text in dict.fromkeys(texts or [""]):
                self._check_words(text)

    def _check_words(self, text: str) -> None:
        """Check that question and prompt hold no control token.

        In the chat template's words it would end the question, speak for the model, or stand for
        an image.

        Raises:
            ValueError: if they hold one.
        """
        question = self.question.replace("{prompt}", text)
        image = str(getattr(self.processor, "image_token", None) or "")
        for token in [image, *self._control_tokens()]:
            if token and token in question:
                where = "question" if token in self.question else "prompts"
                means = "stands for an image to" if token == image else "is a control token of"
                raise ValueError(
                    f"{where}: {token} {means} {self.name}: leave it out of the {where}"
                )

    def _control_tokens(self) -> list[str]:
        """Return the tokenizer's special tokens and the added tokens that the template writes."""
        template = str(getattr(self.processor, "chat_template", None) or "")
        return [
            added.content
            for added in self.processor.tokenizer.added_tokens_decoder.values()
            # a mark such as "!", which some tokenizers pad with, is a word as well
            if len(added.content) > 1 and not added.content.isspace()
            if added.special or added.content in template
        ]

    def _asked(self, text: str) -> str:
        """Return the question about an image in the words of the model's chat template."""
        question = self.question.replace("{prompt}", text)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        if getattr(self.processor, "chat_template", None) is not None:
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        if getattr(self.processor, "num_query_tokens", None) is not None:
            return question  # BLIP-2's processor puts the image first by itself
        return f"{getattr(self.processor, 'image_token', None) or '<image>'}\n{question}"

    def _first_tokens(self, asked: str, ways: Sequence[str]) -> list[int]:
        """Return the tokens that may begin the answer after the question.

        They are the first tokens of the answer, however it is written, with and without a space
        before it; a space alone is none.

        Raises:
            ValueError: if the vocabulary has no such token.
        """
        tokenizer = self.processor.tokenizer

        def ids(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        before, found = ids(asked), set()
        for answer in (space + way for way in ways for space in ("", " ")):
            after = ids(asked + answer)
            if after[: len(before)] == before and len(after) > len(before):
                found.add(after[len(before)])
        found = {one for one in found - {tokenizer.unk_token_id} if tokenizer.decode([one]).strip()}
        if not found:
            raise ValueError(
                f"answer: {self.name} has no token with which {ways[0]!r} begins: "
                "name another answer"
            )
        return sorted(found)


def begun(tokenizer: Any, text: str) -> dict[str, bool]:
    """Return options of a processor by which a text that a template has begun begins once."""
    bos = tokenizer.bos_token
    return {"add_special_tokens": False} if bos and text.startswith(bos) else {}
