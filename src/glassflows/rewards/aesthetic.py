"""The aesthetic predictor: how much people like an image, whatever the prompt.

The predictor is a CLIP and a linear head, which scores the CLIP's embedding of the image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .images import CLIP_MEAN, CLIP_STD, cropped, normalised
from .model import ModelReward, found, linear_head, located, state_of


class AestheticScore(ModelReward):
    """A linear head on the unit-length image embedding of CLIP ViT-L/14; prompts are ignored.

    Scores are about 4 to 8; the ratings in training were 1 to 10. `reward_scale` is 5, because the
    scores for one prompt scatter by some tenths.

    Args:
        model: Name, folder or file of the head, aesthetic-model.pth;
            trl-lib/ddpo-aesthetic-predictor by default.
        clip: Name or folder of the CLIP; None for the CLIP in the folder of the head, else
            openai/clip-vit-large-patch14.
        device: Device of the model; None for the accelerator, if there is one.
        dtype: Floating point type of the model.

    Reference:
        Schuhmann et al., arXiv:2210.08402, section 3.3; Black et al., arXiv:2305.13301 (the
        checkpoint).
    """

    reward_scale = 5.0
    default = "trl-lib/ddpo-aesthetic-predictor"
    files = "aesthetic-model.pth, and of the CLIP config.json and model.safetensors"
    offline = "AestheticScore.from_pretrained('/head', clip='/clip')"
    needs_prompts = False

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        clip: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, device=device, dtype=dtype)
        own = (
            self.name
            if (Path(self.name) / "config.json").is_file()
            else "openai/clip-vit-large-patch14"
        )
        self.clip = located(clip or own)

    def _read(self) -> dict[str, nn.Module]:
        from transformers import CLIPModel

        clip: Any = CLIPModel.from_pretrained(self.clip)
        clip = clip.to(self.dtype)
        head = linear_head(state_of(found(self.name, "aesthetic-model.pth"))).to(self.exact)
        return {"vision": clip.vision_model, "projection": clip.visual_projection, "head": head}

    def _sources(self) -> list[str]:
        return [self.name, self.clip]

    def _scores(self, images: Tensor, texts: list[str]) -> Tensor:
        vision, projection, head = map(self._network, ("vision", "projection", "head"))
        pixels = normalised(cropped(images, vision.config.image_size), CLIP_MEAN, CLIP_STD)
        embeds = projection(vision(pixel_values=pixels.to(self.dtype)).pooler_output)
        return head(normalize(embeds.to(self.exact), dim=-1)).squeeze(-1)
