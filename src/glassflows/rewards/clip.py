"""Rewards of a CLIP model: the similarity of an image and its prompt.

The similarity is the cosine of the embeddings of image and prompt. `CLIPScore` takes a CLIP as it
was trained, `PickScore` and `HPSv2` take a CLIP that was tuned to people's choices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from .images import CLIP_MEAN, CLIP_STD, cropped, normalised, padded
from .model import ModelReward, found, located, state_of, with_words
from .open_clip import cleaned, clip_from_open_clip

_LAION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class CLIPScore(ModelReward):
    """100 · max(cos(image, text), 0) of any `transformers.CLIPModel`.

    Scores are 0 to 100, about 34 for a good image with OpenAI's large model. `reward_scale` is 1,
    because the scores for one prompt scatter by about 2.5. Prompts are cut at the model's context
    of 77 tokens, with one warning.

    Args:
        model: Name or folder; openai/clip-vit-large-patch14 by default.
        processor: Name or folder of tokenizer and image processor; None for the model's own.
        device: Device of the model; None for the accelerator, if there is one.
        dtype: Floating point type of the model.

    Reference:
        Radford et al., arXiv:2103.00020; Hessel et al., arXiv:2104.08718.
    """

    reward_scale = 1.0
    default = "openai/clip-vit-large-patch14"
    default_processor: ClassVar[str | None] = None  # for models without their own
    files = (
        "config.json, model.safetensors, "
        "and of its processor preprocessor_config.json and tokenizer.json"
    )
    offline = "CLIPScore.from_pretrained('/model', processor='/processor')"

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        processor: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, device=device, dtype=dtype)
        has_own = self.default_processor is None or any(Path(self.name).glob("tokenizer*.json"))
        self.processor = located(
            processor or (self.name if has_own else str(self.default_processor))
        )
        self.tokenizer: Any = None

    def _read(self) -> dict[str, nn.Module]:
        from transformers import AutoTokenizer, CLIPModel
        from transformers.image_processing_base import ImageProcessingMixin

        pixels, _ = ImageProcessingMixin.get_image_processor_dict(self.processor)
        self.mean, self.std = pixels["image_mean"], pixels["image_std"]
        self.tokenizer = with_words(AutoTokenizer.from_pretrained(self.processor), self.processor)
        return self._cast(CLIPModel.from_pretrained(self.name))

    def _sources(self) -> list[str]:
        return [self.name, self.processor]

    def _cast(self, clip: Any) -> dict[str, nn.Module]:
        """Return the model in its dtype, with its logit scale in `exact`.

        In bfloat16 exp(4.6052) would be 99 instead of 100.
        """
        scale = clip.logit_scale.data.to(self.exact)
        clip = clip.to(self.dtype)
        clip.logit_scale.data = scale
        return {"clip": clip}

    def _pixels(self, images: Tensor) -> Tensor:
        """Resize the shorter side, crop the centre square, normalise."""
        return normalised(
            cropped(images, self._network("clip").config.vision_config.image_size),
            self.mean,
            self.std,
        )

    def _scores(self, images: Tensor, texts: list[str]) -> Tensor:
        return 100 * self._cosine(images, texts).clamp(min=0)

    def _cosine(self, images: Tensor, texts: list[str]) -> Tensor:
        """Return the cosine of each image and its text, shape (n,)."""
        unique = list(dict.fromkeys(texts))
        clip = self._network("clip")
        tokens = self._tokens(
            self.tokenizer, unique, clip.config.text_config.max_position_embeddings
        )
        out = clip(pixel_values=self._pixels(images).to(self.dtype), **tokens)
        rows = torch.tensor([unique.index(text) for text in texts], device=self.device)
        return cosine_similarity(
            out.image_embeds.to(self.exact), out.text_embeds[rows].to(self.exact)
        )


class PickScore(CLIPScore):
    """exp(s) · cos(image, text) of a CLIP tuned to people's choices between two images.

    The logit scale of the CLIP is s. Scores are about 20 to 24. `reward_scale` is 10, because the
    scores for one prompt scatter by about 0.3.

    Args:
        model: Name or folder; yuvalkirstain/PickScore_v1 by default.
        processor: Name or folder of tokenizer and image processor; None for those in the model's
            folder, else laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
        device: Device of the model; None for the accelerator, if there is one.
        dtype: Floating point type of the model.

    Reference:
        Kirstain et al., arXiv:2305.01569.
    """

    reward_scale = 10.0
    default = "yuvalkirstain/PickScore_v1"
    default_processor = _LAION
    offline = "PickScore.from_pretrained('/model', processor='/processor')"

    def _scores(self, images: Tensor, texts: list[str]) -> Tensor:
        return self._network("clip").logit_scale.exp() * self._cosine(images, texts)


class HPSv2(CLIPScore):
    """Human preference score v2: cos(image, text) of a CLIP tuned to people's rankings.

    Scores are about 0.25 to 0.32. `reward_scale` is 250, because the scores for one prompt scatter
    by about 0.01. Images are scaled by the longer side and padded with black, and prompts are
    cleaned by open_clip's rules, as in the published code.

    Args:
        model: Name, folder or file; xswu/HPSv2 by default. That is version 2.1, a checkpoint of
            open_clip; version 2.0 is adams-story/HPSv2-hf.
        processor: Name or folder of the tokenizer; None for the tokenizer in the model's folder,
            else laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
        device: Device of the model; None for the accelerator, if there is one.
        dtype: Floating point type of the model.

    Reference:
        Wu et al., arXiv:2306.09341.
    """

    reward_scale = 250.0
    default = "xswu/HPSv2"
    default_processor = _LAION
    offline = "HPSv2.from_pretrained('/model', processor='/tokenizer')"
    checkpoint: ClassVar[str] = "HPS_v2.1_compressed.pt"
    files = (
        f"{checkpoint}, or config.json and model.safetensors, and tokenizer.json of its processor"
    )

    def _read(self) -> dict[str, nn.Module]:
        from transformers import AutoTokenizer, CLIPModel

        self.tokenizer = with_words(AutoTokenizer.from_pretrained(self.processor), self.processor)
        path = Path(self.name)
        if self.name == self.default or path.is_file() or (path / self.checkpoint).is_file():
            return self._cast(clip_from_open_clip(state_of(found(self.name, self.checkpoint))))
        return self._cast(CLIPModel.from_pretrained(self.name))

    def _pixels(self, images: Tensor) -> Tensor:
        return normalised(
            padded(images, self._network("clip").config.vision_config.image_size),
            CLIP_MEAN,
            CLIP_STD,
        )

    def _scores(self, images: Tensor, texts: list[str]) -> Tensor:
        return self._cosine(images, [cleaned(text) for text in texts])
