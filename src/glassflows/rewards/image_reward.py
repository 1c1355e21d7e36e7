"""ImageReward: a BLIP that reads the prompt while it looks at the image.

BLIP is an image encoder and a text encoder that attends to the image. ImageReward tuned it to
people's rankings of images, with a linear head on the first token of the text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .images import CLIP_MEAN, CLIP_STD, cropped, normalised
from .model import (
    ModelReward,
    found,
    linear_head,
    located,
    num_layers,
    state_of,
    under,
    with_words,
)

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the scores in training
_VISION_HEADS, _TEXT_HEADS = 16, 12  # of BLIP large; all other sizes follow from the shapes
_VISION = {  # the names of BLIP and those of transformers
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class ImageReward(ModelReward):
    """(h(BLIP(image, prompt)) − 0.167) / 1.033, with a linear head h on the first token.

    Scores are about −2 to 2, with mean 0 and standard deviation 1 over the training data.
    `reward_scale` is 10. Prompts are cut at 35 tokens, with one warning.

    Args:
        model: Name, folder or file of ImageReward.pt; zai-org/ImageReward (formerly THUDM) by
            default.
        tokenizer: Name or folder of BERT's tokenizer; None for the tokenizer in the model's folder,
            else bert-base-uncased.
        device: Device of the model; None for the accelerator, if there is one.
        dtype: Floating point type of the model.

    Reference:
        Xu et al., arXiv:2304.05977.
    """

    reward_scale = 10.0
    default = "zai-org/ImageReward"
    files = "ImageReward.pt, and vocab.txt of bert-base-uncased"
    offline = "ImageReward.from_pretrained('/model', tokenizer='/bert')"

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, device=device, dtype=dtype)
        own = self.name if (Path(self.name) / "vocab.txt").is_file() else "bert-base-uncased"
        self._tokenizer_name = located(tokenizer or own)
        self.tokenizer: Any = None

    def _read(self) -> dict[str, nn.Module]:
        from transformers import AutoTokenizer

        state = state_of(found(self.name, "ImageReward.pt"))
        self.tokenizer = with_words(
            AutoTokenizer.from_pretrained(self._tokenizer_name, tokenizer_type="bert"),
            self._tokenizer_name,
        )
        return {
            "vision": blip_vision(under(state, "blip.visual_encoder.")).to(self.dtype),
            "text": blip_text(under(state, "blip.text_encoder.")).to(self.dtype),
            "head": linear_head(under(state, "mlp.")).to(self.exact),
        }

    def _sources(self) -> list[str]:
        return [self.name, self._tokenizer_name]

    def _scores(self, images: Tensor, texts: list[str]) -> Tensor:
        vision, text, head = map(self._network, ("vision", "text", "head"))
        pixels = normalised(cropped(images, vision.config.image_size, round), CLIP_MEAN, CLIP_STD)
        seen = vision(pixel_values=pixels.to(self.dtype)).last_hidden_state
        everywhere = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        tokens = self._tokens(self.tokenizer, texts, 35)
        read = text(
            **tokens, encoder_hidden_states=seen, encoder_attention_mask=everywhere
        ).last_hidden_state
        return (head(read[:, 0].to(self.exact)).squeeze(-1) - _MEAN) / _STD


def blip_vision(state: dict[str, Tensor]) -> nn.Module:
    """Return the `BlipVisionModel` that holds BLIP's own tensors, with 16 heads."""
    from transformers import BlipVisionConfig, BlipVisionModel

    renamed = {}
    for name, value in state.items():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            module, _, kind = rest.rpartition(".")
            renamed[f"encoder.layers.{number}.{_BLOCK[module]}.{kind}"] = value
        else:
            module, _, kind = name.rpartition(".")
            renamed[_VISION[name] if name in _VISION else f"{_VISION[module]}.{kind}"] = value
    patches, width = state["pos_embed"].shape[1:]
    patch_size = state["patch_embed.proj.weight"].shape[-1]
    model = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(state["blocks.0.mlp.fc1.bias"]),
            num_hidden_layers=num_layers(state, "blocks."),
            num_attention_heads=_VISION_HEADS,
            patch_size=patch_size,
            image_size=patch_size * round((patches - 1) ** 0.5),
            layer_norm_eps=1e-6,
        )
    )
    model.load_state_dict(renamed, assign=True)  # in the dtype of the checkpoint
    return model


def blip_text(state: dict[str, Tensor]) -> nn.Module:
    """Return the `BlipTextModel` that holds BLIP's own tensors under their names, with 12 heads."""
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vocab_size, width = state["embeddings.word_embeddings.weight"].shape
    model = BlipTextModel(
        BlipTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
            intermediate_size=len(state["encoder.layer.0.intermediate.dense.bias"]),
            num_hidden_layers=num_layers(state, "encoder.layer."),
            num_attention_heads=_TEXT_HEADS,
            max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
            layer_norm_eps=1e-12,
            bos_token_id=vocab_size - 2,
            sep_token_id=min(102, vocab_size - 1),
        ),
        add_pooling_layer=False,
    )
    model.load_state_dict(
        {name: value for name, value in state.items() if not name.endswith("position_ids")},
        assign=True,
    )
    return model
