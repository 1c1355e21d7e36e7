"""CLIP score of images under their prompts, on transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_processing_base import ImageProcessingMixin


class CLIPScore:
    """The logit of an image under its prompt: exp(s) · cos(image, text), s the model's own logit scale.

    For OpenAI's models exp(s) = 100, so this is the usual CLIP score. `reward_scale` is 1: the unit is that of the
    contrastive posterior the model was trained with.

    Args:
        model: Name or folder of a `transformers.CLIPModel` with its processor.
        device: Where it runs; None for the CPU.
        dtype: Its floating point type.

    Reference:
        Radford et al., arXiv:2103.00020; Hessel et al., arXiv:2104.08718.
    """

    reward_scale = 1.0

    def __init__(
        self,
        model: str | Path = "openai/clip-vit-large-patch14",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        loaded: Any = CLIPModel.from_pretrained(model, dtype=dtype)
        self.model = loaded.to(device or "cpu").eval().requires_grad_(False)
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(model)
        pixels, _ = ImageProcessingMixin.get_image_processor_dict(model)
        self._mean, self._std = (
            torch.tensor(value, dtype=dtype, device=self.model.device).view(3, 1, 1)
            for value in (pixels["image_mean"], pixels["image_std"])
        )

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Return the scores, shape (N,), float32, of images (N, 3, H, W) in [0, 1] under one prompt each."""
        unique = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(unique, padding="max_length", truncation=True, return_tensors="pt").to(
            self.model.device
        )
        out = self.model(pixel_values=self._pixels(images), **tokens)
        rows = torch.tensor([unique.index(prompt) for prompt in prompts], device=self.model.device)
        cosine = (out.image_embeds * out.text_embeds[rows]).sum(-1)
        return (self.model.logit_scale.exp() * cosine).float()

    def _pixels(self, images: Tensor) -> Tensor:
        """Resize the shorter side, crop the centre square, normalise."""
        size = self.model.config.vision_config.image_size
        images = images.to(self._mean)
        scale = size / min(images.shape[-2:])
        if scale != 1:
            shape = [max(size, round(side * scale)) for side in images.shape[-2:]]
            images = interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((side - size) // 2 for side in images.shape[-2:])
        return (images[..., top : top + size, left : left + size] - self._mean) / self._std
