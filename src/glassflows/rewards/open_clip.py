"""Checkpoints and texts of open_clip for models of transformers.

Both libraries hold the same CLIP under different names. open_clip stacks the three projections of
an attention layer in one tensor, and transposes the projections of the two towers. It also cleans
every text, where the tokenizers of transformers do no more than to compose accents and to collapse
spaces.
"""

from __future__ import annotations

import re
from html import unescape

from torch import Tensor, nn

from .model import num_layers, under

_NUM_HEADS = 16  # of both towers of ViT-H-14; all other sizes follow from the shapes
_OUTSIDE = {  # the names of open_clip and those of transformers
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_INSIDE = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def cleaned(text: str) -> str:
    """Return a text as open_clip cleans it before it is split into tokens.

    ftfy mends what is broken (mojibake) and straightens quotes, ligatures and full-width letters.
    Then entities of HTML are resolved twice, letters become small, and spaces are collapsed.
    """
    if "&" in text or not (text.isascii() and text.isprintable()):  # ftfy leaves all else alone
        from ftfy import fix_text

        text = fix_text(text)
    text = " ".join(unescape(unescape(text)).split()).lower()
    # words to open_clip, whose control tokens have other names
    return re.sub(r"<\|(startoftext|endoftext)\|>", r"<| \1 |>", text)


def clip_from_open_clip(state: dict[str, Tensor]) -> nn.Module:
    """Return the `CLIPModel` of an open_clip checkpoint.

    Args:
        state: Tensors of the checkpoint by name, of ViT-H-14 or a smaller model of 16 heads.
    """
    from transformers import CLIPConfig, CLIPModel

    patches, vision_width = state["visual.positional_embedding"].shape
    patch_size = state["visual.conv1.weight"].shape[-1]
    vocab_size, text_width = state["token_embedding.weight"].shape
    common = {"num_attention_heads": _NUM_HEADS, "hidden_act": "gelu"}
    config = CLIPConfig(
        projection_dim=state["text_projection"].shape[1],
        vision_config={
            "hidden_size": vision_width, "patch_size": patch_size,
            "intermediate_size": len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
            "num_hidden_layers": num_layers(state, "visual.transformer.resblocks."),
            "image_size": patch_size * round((patches - 1) ** 0.5), **common,
        },
        text_config={
            "hidden_size": text_width, "vocab_size": vocab_size, "eos_token_id": vocab_size - 1,
            "bos_token_id": vocab_size - 2, "pad_token_id": vocab_size - 1,
            "intermediate_size": len(state["transformer.resblocks.0.mlp.c_fc.bias"]),
            "num_hidden_layers": num_layers(state, "transformer.resblocks."),
            "max_position_embeddings": len(state["positional_embedding"]), **common,
        },
    )  # fmt: skip
    model = CLIPModel(config)
    model.load_state_dict(from_open_clip(state), assign=True)  # in the dtype of the checkpoint
    return model


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an open_clip checkpoint by transformers' names."""
    renamed = {_OUTSIDE[name]: value for name, value in state.items() if name in _OUTSIDE}
    renamed["visual_projection.weight"] = state["visual.proj"].T.contiguous()
    renamed["text_projection.weight"] = state["text_projection"].T.contiguous()
    for tower, prefix in (
        ("vision_model", "visual.transformer.resblocks."),
        ("text_model", "transformer.resblocks."),
    ):
        for name, value in under(state, prefix).items():
            number, _, rest = name.partition(".")
            layer = f"{tower}.encoder.layers.{number}."
            module, _, kind = rest.rpartition(".")
            if module in _INSIDE:
                renamed[f"{layer}{_INSIDE[module]}.{kind}"] = value
            else:  # attn.in_proj_weight and attn.in_proj_bias stack three projections
                for part, one in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{layer}self_attn.{part}_proj.{kind.removeprefix('in_proj_')}"] = one
    return renamed
