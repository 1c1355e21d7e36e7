"""CLIP-FlanT5: CLIP's patches of an image within the text that T5 reads, the model of VQAScore."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .images import CLIP_MEAN, CLIP_STD, normalised, resized
from .model import in_dtype, with_words

MODEL_TYPE = "clip_t5"  # in its config.json, which transformers does not know
_BEFORE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: "
)
_AFTER = "\n{question} ASSISTANT: "


class CLIPT5(nn.Module):
    """CLIP's vision model, a projector and T5.

    Args:
        name: Folder or name of T5 with the projector, config.json of type "clip_t5".
        tower: That of CLIP's vision model; None for the one that the config names.
        tokenizer: That of T5's tokenizer; None for `name`.
        dtype: Floating point type.

    Raises:
        OSError: if the checkpoint has no projector, or the tokenizer no vocabulary.
    """

    def __init__(
        self, name: str, tower: str | None, tokenizer: str | None, dtype: torch.dtype
    ) -> None:
        from transformers import (
            AutoTokenizer,
            CLIPVisionModel,
            T5Config,
            T5ForConditionalGeneration,
        )

        class Language(T5ForConditionalGeneration):
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                width = config.d_model
                self.mm_projector = nn.Sequential(
                    nn.Linear(config.mm_hidden_size, width), nn.GELU(), nn.Linear(width, width)
                )

        super().__init__()
        settings, _ = T5Config.get_config_dict(name)
        config = T5Config.from_dict({**settings, "model_type": "t5"})
        options = in_dtype(dtype)
        language: Any = Language  # typed as what is read, without what is told of it
        self.language, told = language.from_pretrained(
            name, config=config, output_loading_info=True, **options
        )
        absent = [key for key in told["missing_keys"] if key.startswith("mm_projector")]
        if absent:
            raise OSError(f"{name} has no {', '.join(sorted(absent))}")
        self.tokenizer: Any = with_words(AutoTokenizer.from_pretrained(tokenizer or name), name)
        self.vision: Any = CLIPVisionModel.from_pretrained(
            tower or settings["mm_vision_tower"], **options
        )
        self.layer = settings.get("mm_vision_select_layer", -2)

    def forward(self, images: Tensor, questions: Sequence[str], answer: str) -> Tensor:
        """Return the geometric mean of the chances of an answer's tokens, shape (N,), float32.

        The end of the answer is one of them: for "Yes" that is (P(Yes) P(end | Yes))^½.

        Args:
            images: Shape (N, 3, H, W), in [0, 1].
            questions: One for each image.
            answer: The answer.
        """
        embeddings, mask = self._read(images, questions)
        labels = torch.tensor(self.tokenizer(answer)["input_ids"], device=images.device)
        start = self.language.config.decoder_start_token_id
        before = torch.cat([labels.new_tensor([start]), labels[:-1]]).expand(len(images), -1)
        logits = self.language(
            inputs_embeds=embeddings, attention_mask=mask, decoder_input_ids=before, use_cache=False
        ).logits
        exact = torch.promote_types(logits.dtype, torch.float32)
        chances = logits[..., : len(self.tokenizer)].to(exact).log_softmax(-1)
        return chances.gather(2, labels.expand(len(images), -1)[..., None])[..., 0].mean(1).exp()

    def _read(self, images: Tensor, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return what the encoder reads, padded on the right, and which of it is none."""
        side = self.vision.config.image_size
        pixels = normalised(resized(_squared(images), side, side), CLIP_MEAN, CLIP_STD)
        states = self.vision(pixels.to(self.vision.dtype), output_hidden_states=True).hidden_states
        patches = self.language.mm_projector(states[self.layer][:, 1:])
        words = self.language.get_input_embeddings()

        def embedded(text: str) -> Tensor:
            ids = self.tokenizer(text, split_special_tokens=True)["input_ids"]
            return words(torch.tensor(ids, device=images.device))

        before = embedded(_BEFORE)
        rows = [
            torch.cat([before, some, embedded(_AFTER.format(question=question))])
            for some, question in zip(patches, questions, strict=True)
        ]
        longest = max(len(row) for row in rows)
        mask = torch.tensor([[i < len(row) for i in range(longest)] for row in rows])
        padded = torch.stack([pad(row, (0, 0, 0, longest - len(row))) for row in rows])
        return padded, mask.to(images.device, torch.long)


def _squared(images: Tensor) -> Tensor:
    """Return images padded on two sides to squares, with CLIP's mean colour rounded to bytes."""
    height, width = images.shape[-2:]
    side = max(height, width)
    colour = images.new_tensor([int(255 * mean) / 255 for mean in CLIP_MEAN]).view(3, 1, 1)
    square = colour.expand(len(images), 3, side, side).clone()
    top, left = (side - height) // 2, (side - width) // 2
    square[..., top : top + height, left : left + width] = images
    return square
