"""Toy text encoders and tokenizers, so that the pipelines of the zoo are called with words and pictures as by a user.

`worded(case)` gives a pipeline that was built without encoders those its constructor asks for, as wide as the
embeddings of the case's own call, and puts words and PIL images in the place of embeddings and tensors.
"""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from tiny import clip_text, t5_tokenizer

from . import Case, kolors

WORDS = "a cat"
NEGATIVE = "dull"

# ---- tokenizers ------------------------------------------------------------------------------------------------------


@cache
def byte_tokenizer() -> Any:
    """Return a tokenizer of bytes with the special tokens that templates name; it knows chats."""
    special = [
        "<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
        "<|video_pad|>", "<bos>", "<eos>", "<image>",
    ]  # fmt: skip
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = Tokenizer(models.BPE(vocab, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", model_max_length=1024,
        extra_special_tokens=special[1:8] + special[10:],
    )  # fmt: skip
    made.chat_template = (
        "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{{ part.get('text', '') }}{% endfor %}{% endif %}{% endfor %}"
    )
    return made


class Processor:
    """All that pipelines read of a processor of words and images; a real one needs torchvision for its videos.

    Args:
        patch_size: Sides of the patches that its encoder sees.
    """

    def __init__(self, patch_size: int = 14) -> None:
        self.tokenizer = byte_tokenizer()
        self.image_processor = transformers.Qwen2VLImageProcessorPil(
            patch_size=patch_size, min_pixels=(4 * patch_size) ** 2, max_pixels=(4 * patch_size) ** 2
        )

    def __call__(self, text: str | list[str], images: Any = None, videos: Any = None, **options: Any) -> Any:
        text = [text] if isinstance(text, str) else text
        if images is None:
            return transformers.BatchFeature(self.tokenizer(text, **options))
        pixels = self.image_processor(images, return_tensors="pt")
        tokens = iter(int(grid.prod()) // 4 for grid in pixels["image_grid_thw"])  # 2 × 2 patches make one
        text = [re.sub(r"<\|image_pad\|>", lambda mark: mark[0] * next(tokens), one) for one in text]
        words = self.tokenizer(text, **options)
        is_image = words["input_ids"] == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        return transformers.BatchFeature({**words, **pixels, "mm_token_type_ids": is_image.long()})

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        made = self.tokenizer.apply_chat_template(messages, **options)
        return [made] if options.get("tokenize") and not options.get("return_dict") else made

    def decode(self, *args: Any, **options: Any) -> str:
        return self.tokenizer.decode(*args, **options)

    def batch_decode(self, *args: Any, **options: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **options)


def clip_tokenizer() -> Any:
    return clip_text()[1]


def letters() -> Any:
    words = t5_tokenizer()
    words.model_max_length = 64
    return words


def image_processor() -> Any:
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_convert_rgb=True
    )


READERS: dict[str, Callable[[], Any]] = {
    "CLIPTokenizer": clip_tokenizer,
    "ChatGLMTokenizer": kolors.Letters,
    **dict.fromkeys(("T5Tokenizer", "ByT5Tokenizer"), letters),
    **dict.fromkeys(("Qwen2VLProcessor", "Qwen3VLProcessor", "AutoProcessor"), Processor),
    **dict.fromkeys(("CLIPImageProcessorPil", "CLIPImageProcessor"), image_processor),
    **dict.fromkeys(
        (
            "AutoTokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "LlamaTokenizer", "BertTokenizer", "TokenizersBackend",
            "PreTrainedTokenizerBase", "PreTrainedTokenizerFast",
        ),
        byte_tokenizer,
    ),
}  # fmt: skip


# ---- encoders --------------------------------------------------------------------------------------------------------


def clip(name: str, width: int, vocabulary: int, layers: int, projection: int) -> Any:
    sizes = {**clip_text()[0].config.to_dict(), "hidden_size": width, "projection_dim": projection}
    sizes |= {"num_hidden_layers": layers, "max_position_embeddings": 77}
    return getattr(transformers, name)(transformers.CLIPTextConfig(**sizes))


def t5(name: str, width: int, vocabulary: int, *_: int) -> Any:
    config = getattr(transformers, name.replace("EncoderModel", "Config"))
    sizes = {"vocab_size": vocabulary, "d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return getattr(transformers, name)(config(**sizes))


def bert(width: int, vocabulary: int, *_: int) -> Any:
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertModel(transformers.BertConfig(vocab_size=vocabulary, **sizes))


def chat_glm(width: int, *_: int) -> Any:
    return kolors.encoder()["text_encoder"]


def decoder(name: str, width: int, vocabulary: int, layers: int, *_: int) -> Any:
    """Return a language model."""
    config = re.sub("Model$|ForCausalLM$", "Config", name)
    return getattr(transformers, name)(getattr(transformers, config)(**decoder_sizes(name, width, vocabulary, layers)))


def decoder_sizes(name: str, width: int, vocabulary: int, layers: int) -> dict[str, Any]:
    sizes = {
        "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": width // 2, "vocab_size": vocabulary, "pad_token_id": 0,
        "bos_token_id": 8, "eos_token_id": 9,
    }  # fmt: skip
    if "VL" in name:
        third = width // 12
        sections = [width // 4 - 2 * third, third, third]
        sizes |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}}
    return sizes


def seeing(name: str, width: int, vocabulary: int, layers: int, *_: int) -> Any:
    """Return a language model with eyes."""
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 14 if "Qwen2" in name else 4, "out_hidden_size": width,
        "deepstack_visual_indexes": [],
    }  # fmt: skip
    marks = {"image_token_id": 6, "video_token_id": 7, "vision_start_token_id": 4, "vision_end_token_id": 5}
    config = getattr(transformers, re.sub("Model$|ForConditionalGeneration$", "Config", name))
    text = decoder_sizes(name, width, vocabulary, layers)
    return getattr(transformers, name)(
        config(text_config=text, vision_config=vision, **(marks if "Qwen" in name else {}))
    )


ENCODERS: dict[str, Callable[..., Any]] = {
    **{name: partial(clip, name) for name in ("CLIPTextModel", "CLIPTextModelWithProjection")},
    **{name: partial(t5, name) for name in ("T5EncoderModel", "UMT5EncoderModel")},
    # they encode both ways, as T5 does
    **dict.fromkeys(("T5GemmaEncoder", "T5GemmaEncoderModel", "T5Gemma2Encoder"), partial(t5, "T5EncoderModel")),
    "BertModel": bert,
    "ChatGLMModel": chat_glm,
    "GemmaPreTrainedModel": partial(decoder, "GemmaModel"),
    "Gemma2PreTrainedModel": partial(decoder, "Gemma2Model"),
    "PreTrainedModel": partial(decoder, "Qwen3Model"),
    **{
        name: partial(decoder, name)
        for name in (
            "GlmModel", "LlamaModel", "LlamaForCausalLM", "Qwen3Model", "Qwen3ForCausalLM"
        )
    },
    **{
        name: partial(seeing, name)
        for name in (
            "Qwen2_5_VLForConditionalGeneration", "Qwen2VLForConditionalGeneration", "Qwen3VLForConditionalGeneration",
            "Qwen3VLModel", "Mistral3Model", "Mistral3ForConditionalGeneration", "LlavaForConditionalGeneration",
            "Gemma3ForConditionalGeneration",
        )
    },
    "Qwen2_5_VLTextModel": lambda *sizes: seeing("Qwen2_5_VLModel", *sizes).language_model,
}  # fmt: skip

LAYERS = 3
"""Of a language model: pipelines read some of their layers, counted from either end."""
SIZES: dict[str, dict[str, Any]] = {
    "Cosmos2_5": {"layers": 1},  # the features of all layers lie side by side
    "BriaFibo2": {"width": 8},
    "Flux2": {"width": 8},
    "LTX2": {"layers": 1, "width": 8},
    "HiDream": {"width": {"text_encoder": 8, "text_encoder_2": 8}, "projection": 8, "layers": 2},
    "HunyuanSkyreels": {"width": {"text_encoder_2": 8}},
    "HunyuanVideo": {"width": {"text_encoder_2": 8}},
    "HunyuanVideo15": {"width": {}},
    "Kandinsky5": {"width": {"text_encoder_2": 16}},
    "StableDiffusion3": {"width": {"text_encoder": 8, "text_encoder_2": 8}, "projection": 8},
    "StableDiffusionXL": {"width": 8},
    "AnimateDiffSDXL": {"width": 8},
}
"""By the beginning of a class's name, the longest one that fits: where the embeddings are of several encoders."""

CALLS: dict[str, dict[str, Any]] = {
    "CogVideoX": {"max_sequence_length": 6},
    "ConsisID": {"max_sequence_length": 6},
    "Flux2": {"text_encoder_out_layers": (1, 2)},
    "HiDream": {"max_sequence_length": 16},
    "LDMSuperResolution": {"image": Image.new("RGB", (64, 32), "teal")},
    "Nucleus": {"return_index": -1},
    "Kandinsky5": {"max_sequence_length": 1024},
    "Lumina": {"max_sequence_length": 16},
    "Lumina2": {"max_sequence_length": 48, "system_prompt": "s"},
    "BriaFiboEdit": {"prompt": '{"edit_instruction": "a"}'},
    "Ideogram4": {"max_sequence_length": 48},
}
"""What calls in words say beside."""


def of_class(table: dict[str, dict[str, Any]], pipe: Any) -> dict[str, Any]:
    fitting = [name for name in table if type(pipe).__name__.startswith(name)]
    return table[max(fitting, key=len)] if fitting else {}


# ---- calls -----------------------------------------------------------------------------------------------------------

_EMBEDDINGS = re.compile(
    r"prompt_embeds|prompt_attention_mask|^(negative_)?(encoder_)?attention_mask$|cu_seqlens|pooled"
)
_PICTURES = re.compile("image|mask|frames|^video$")


def parameters(case: Case) -> set[str]:
    """Return the names of the arguments of a case's class."""
    return set(inspect.signature(getattr(diffusers, case.name).__call__).parameters)


def worded(case: Case) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline of a case with encoders, and a call of it with words and pictures; the same each time."""
    torch.manual_seed(0)  # some encoders of images are made before a family seeds
    pipe, call = case.build(), case.call()
    module: Any = sys.modules[type(pipe).__module__]
    if not hasattr(module, "ftfy"):
        module.ftfy = SimpleNamespace(fix_text=str)  # an extra of diffusers, which some modules call without it
    torch.manual_seed(7)
    for name, parameter in inspect.signature(type(pipe).__init__).parameters.items():
        if getattr(pipe, name, "no component") is None:
            kinds = annotated(parameter)
            made = [ENCODERS[kind](*sizes(pipe, name, kind, call)).eval() for kind in kinds if kind in ENCODERS]
            made += [READERS[kind]() for kind in kinds if kind in READERS]
            if made and (reads(pipe, name) or "tokenizer" in name or "text" in name):
                pipe.register_modules(**{name: made[0]})
    return pipe, in_words(pipe, call)


def reads(pipe: Any, name: str) -> bool:
    """Return whether a processor of images has an encoder to read them for."""
    return name == "processor" or getattr(pipe, "image_encoder", None) is not None


def annotated(parameter: inspect.Parameter) -> list[str]:
    """Return the names of the classes that a parameter may be of."""
    kind = parameter.annotation
    if isinstance(kind, str):
        return re.split(r"[ |]+", kind)
    return [getattr(one, "__name__", "") for one in typing.get_args(kind) or (kind,)]


def sizes(pipe: Any, name: str, kind: str, call: dict[str, Any]) -> tuple[int, int, int, int]:
    """Return the width, the vocabulary, the number of layers and the width of the projection of an encoder."""
    own = of_class(SIZES, pipe)
    embedded = next((value for key, value in call.items() if "prompt_embeds" in key and "pool" not in key), None)
    while isinstance(embedded, list):
        embedded = embedded[0]
    whole = embedded.shape[-1] if embedded is not None else 16
    width = own.get("width", whole)
    width = width.get(name, whole) if isinstance(width, dict) else width
    pooled = call.get("pooled_prompt_embeds")
    projection = own.get("projection", width if pooled is None else pooled.shape[-1])
    return width, len(byte_tokenizer()), own.get("layers", LAYERS), projection


def in_words(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Return a call with words for its embeddings and PIL images for its tensors."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    made = {name: pictures(name, value) for name, value in call.items() if not _EMBEDDINGS.search(name)}
    if "prompt" in parameters and made.get("prompt") is None:
        made["prompt"] = WORDS
    negative = any(name.startswith("negative_prompt") for name in call)
    if negative and "negative_prompt" in parameters and made.get("negative_prompt") is None:
        made["negative_prompt"] = NEGATIVE
    return made | of_class(CALLS, pipe)


def embedded(call: dict[str, Any]) -> bool:
    """Return whether a call has embeddings, or what belongs to them."""
    return any(_EMBEDDINGS.search(name) and value is not None for name, value in call.items())


def pictures(name: str, value: Any) -> Any:
    """Return images as PIL's; of what is no image the same."""
    if isinstance(value, list):
        return [pictures(name, one) for one in value]
    is_image = isinstance(value, Tensor) and value.ndim in (3, 4) and value.shape[-3] in (1, 3)
    if not is_image or not _PICTURES.search(name):
        return value
    pixels = np.asarray((255 * value.reshape(value.shape[-3:])).byte().movedim(0, -1))
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
