"""How well the text of a prompt can be read in the image, by a model that reads."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .images import Images, as_tensors, pictures_of
from .model import ModelReward, in_dtype, moved, with_words
from .qwen import processor_of
from .vlm import begun

QUESTION = "Read the text in this image. Answer with the text alone."

_LINES, _PAGES = "vision-encoder-decoder", "got_ocr2"  # kinds of models that are asked nothing
# 27" is inches
_QUOTED = re.compile(r'(?<!\w)"([^"]+)"(?!\w)|“([^“”]+)”|«([^«»]+)»|„([^„“”]+)[“”]')


class OCRScore(ModelReward):
    """1 − d / n, for an edit distance d of what is read in an image to the n letters it shall say.

    What the image shall say is what the prompt has in quotes: a sign that says "OPEN". The two are
    compared in small letters and without spaces. The distance is Levenshtein's, at most n, and 0 if
    the text is found whole in what is read. Scores are 0 to 1, and `reward_scale` is 10, a guess.
    They have no gradient in the images, because a model reads in words.

    The model is one that reads pages, GOT-OCR 2; one that reads a line of text, TrOCR; or any
    vision-language model of transformers with a chat template, which is asked to read. What it
    reads is what it writes as the most likely, token by token; nothing is drawn at random.

    Args:
        model: Name or folder; stepfun-ai/GOT-OCR-2.0-hf by default.
        text: Returns what an image of a prompt shall say; None for what is in the prompt's quotes.
        max_tokens: Tokens after which reading ends.
        device: Device of the model; None for the accelerator, if there is one.
        dtype: Floating point type of the model.

    Raises:
        ValueError: at a call, if images require a gradient, or a prompt has no text to be read.

    Reference:
        Liu et al., arXiv:2505.05470 (Flow-GRPO, for the formula).
    """

    reward_scale = 10.0
    default = "stepfun-ai/GOT-OCR-2.0-hf"
    files = "config.json, model.safetensors, and the files of its processor"
    offline = "OCRScore.from_pretrained('/model')"
    batch_size = 8  # a page has more pixels than other models see

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        text: Callable[[str], str] | None = None,
        max_tokens: int = 128,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, device=device, dtype=dtype)
        if max_tokens < 1:
            raise ValueError(f"max_tokens: expected a positive number, got {max_tokens}")
        self.text = quoted if text is None else text
        self.max_tokens = max_tokens
        self.kind = ""  # of the model, as its configuration names it
        self.processor: Any = None

    def read(self, images: Images) -> list[str]:
        """Return the text that the model reads in each image.

        Args:
            images: Float tensor (N, 3, H, W) in [0, 1] of any size, or PIL images.

        Raises:
            ValueError: if images are not as above, or require a gradient.
            OSError: if the model's files are not found.
        """
        parts = [part for tensor in as_tensors(images) for part in tensor.split(self.batch_size)]
        with self._alone:
            self.load()
            return [
                text for part in parts for text in self._texts(moved(part, self.device, self.exact))
            ]

    def _read(self) -> dict[str, nn.Module]:
        from transformers import (
            AutoConfig,
            AutoModelForImageTextToText,
            VisionEncoderDecoderModel,
        )

        config = AutoConfig.from_pretrained(self.name)
        self.kind = config.model_type
        as_line = self.kind == _LINES
        if as_line and config.encoder.model_type == "donut-swin":
            raise ValueError("Donut and Nougat begin with a task, of which OCRScore knows nothing")
        self.processor = processor_of(self.name)
        with_words(self.processor.tokenizer, self.name)
        needs_question = self.kind not in (_LINES, _PAGES)
        if needs_question and not getattr(self.processor, "chat_template", None):
            raise ValueError(
                f"a model of kind {self.kind} is asked in the words of a chat template, and its "
                "processor has none"
            )
        kind: Any = VisionEncoderDecoderModel if as_line else AutoModelForImageTextToText
        return {"reader": kind.from_pretrained(self.name, **in_dtype(self.dtype))}

    def _scores(self, images: Tensor, texts: list[str]) -> Tensor:
        targets = [self._target(text) for text in texts]
        read = self._texts(images)
        scores = [legibility(one, target) for one, target in zip(read, targets, strict=True)]
        return torch.tensor(scores, dtype=self.exact, device=images.device)

    def _check_texts(self, texts: list[str]) -> None:
        for text in texts:
            self._target(text)

    def _target(self, prompt: str) -> str:
        target = self.text(prompt)
        if not _letters(target):
            raise ValueError(
                f"prompts: expected the text that is to be read, in quotes, got {prompt[:60]!r}: "
                'write a sign that says "OPEN", or name the text by OCRScore(text=…), a function '
                "of the prompt"
            )
        return target

    def _texts(self, images: Tensor) -> list[str]:
        """Return what the model reads in images (n, 3, H, W)."""
        batch, options = self._asked(pictures_of(images, self))
        reader = self._network("reader")
        named = inspect.signature(reader.forward).parameters
        inputs = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in batch.items()
            if name in named
        }
        # None, because transformers warns of settings for sampling where there is none
        sampling = dict.fromkeys(("temperature", "top_p", "top_k"))
        written = reader.generate(
            **inputs,
            **options,
            **sampling,
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_tokens,
        )
        if not reader.config.is_encoder_decoder:
            written = written[:, inputs["input_ids"].shape[1] :]  # without the question
        texts = self.processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _asked(self, pictures: list[Any]) -> tuple[Any, dict[str, Any]]:
        """Return what the model is given for pictures, and the options of how it writes."""
        if self.kind == _LINES:
            return self.processor(images=pictures, return_tensors="pt"), {}
        tokenizer = self.processor.tokenizer
        if self.kind == _PAGES:  # whose processor writes the question
            ends = {"tokenizer": tokenizer, "stop_strings": "<|im_end|>"}
            return self.processor(images=pictures, return_tensors="pt"), ends
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        asked = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        # pictures of one size take as many tokens each, so that there is nothing to pad
        batch = self.processor(
            text=[asked] * len(pictures),
            images=[[one] for one in pictures],
            return_tensors="pt",
            **begun(tokenizer, asked),
        )
        return batch, {}


def quoted(prompt: str) -> str:
    """Return what a prompt has in quotes, joined by spaces; nothing if it has no quotes.

    Quotes are "…", “…”, «…», „…“ and „…”.

    Example:
        >>> from glassflows.rewards.ocr import quoted
        >>> quoted('a shop with the signs "OPEN" and “24 hours”')
        'OPEN 24 hours'
    """
    return " ".join("".join(groups) for groups in _QUOTED.findall(prompt))


def legibility(read: str, target: str) -> float:
    """Return 1 − d / n for a target of n letters, in small letters and without spaces.

    The distance d is 0 if the target is within what was read, else the edit distance, at most n.

    Example:
        >>> from glassflows.rewards.ocr import legibility
        >>> legibility("We are 0pen", "open"), legibility("opem", "OPEN")
        (0.0, 0.75)
    """
    read, target = _letters(read), _letters(target)
    distance = 0 if target in read else min(edit_distance(read, target), len(target))
    return 1 - distance / len(target)


def edit_distance(one: str, other: str) -> int:
    """Return the fewest letters to insert, delete or replace that make one text of the other.

    This is Levenshtein's distance.

    Example:
        >>> from glassflows.rewards.ocr import edit_distance
        >>> edit_distance("kitten", "sitting")
        3
    """
    row = list(range(len(other) + 1))  # the distances of the letters so far to each beginning
    for i, letter in enumerate(one, 1):
        above, row = row, [i]
        for j, wanted in enumerate(other, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != wanted)))
    return row[-1]


def _letters(text: str) -> str:
    return "".join(text.split()).lower()
