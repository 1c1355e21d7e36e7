"""A vision-language model asked a question about each image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn

from .model import ModelReward

QUESTION = 'Does this image show "{prompt}"? Answer Yes or No.'


class VLMReward(ModelReward):
    """P(the answer begins with "Yes" | image, question): how likely a vision-language model says so.

    From 0 to 1. `reward_scale` is 10. Its processor works on pictures, so it has no gradient in the images.

    Args:
        model: Name or folder of a vision-language model of transformers, with its processor.
        question: What it is asked; {prompt} stands for the prompt.
        answer: The answer whose first token is weighed, against every other one of the vocabulary.
        device: Where it runs; None for the accelerator, if there is one.
        dtype: Its floating point type.

    Raises:
        ValueError: if images require a gradient.

    Reference:
        Lin et al., arXiv:2404.01291 (VQAScore).
    """

    reward_scale = 10.0
    files = "config.json, model.safetensors, and the files of its processor"

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

    def _read(self) -> dict[str, nn.Module]:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(self.name)
        self.processor.tokenizer.padding_side = "left"  # the next token is then the last one of every row
        return {"vlm": AutoModelForImageTextToText.from_pretrained(self.name)}

    def _scores(self, images: Tensor, texts: list[str]) -> Tensor:
        if images.requires_grad:
            raise ValueError("images require a gradient; VLMReward has none: detach them")
        pictures = VaeImageProcessor.numpy_to_pil(images.float().cpu().movedim(1, -1).numpy())
        asked = [self._asked(text) for text in texts or [""] * len(pictures)]
        batch = self.processor(text=asked, images=[[one] for one in pictures], padding=True, return_tensors="pt")
        inputs = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }
        logits = self._network("vlm")(**inputs).logits[:, -1]
        return logits.softmax(-1, dtype=torch.promote_types(self.dtype, torch.float32))[:, self._first_token()]

    def _asked(self, text: str) -> str:
        """Return the question about an image in the words of the model's chat template."""
        content = [{"type": "image"}, {"type": "text", "text": self.question.replace("{prompt}", text)}]
        if getattr(self.processor, "chat_template", None) is None:
            token = getattr(self.processor, "image_token", None) or "<image>"
            return f"{token}\n{content[1]['text']}"
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _first_token(self) -> int:
        return self.processor.tokenizer(self.answer, add_special_tokens=False)["input_ids"][0]
