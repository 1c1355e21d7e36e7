"""Models of the Qwen-VL family at toy size, with random weights, in the files and formats of the published ones.

The HPSv3 is one: a Qwen2-VL by its names in transformers 4.45, with a head.
"""

import json

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText

from glassflows.rewards.hpsv3 import INSTRUCTION, QUESTION

FAMILY = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
           "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
READ = [INSTRUCTION, QUESTION, TEMPLATE, *["Does this image show Yes", " Yes", "No", " No"] * 9]  # to learn words from
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
SIDES = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16}  # of a patch


def processor(folder, family="qwen2_vl", fewest=256, most=256):
    """Write a tokenizer of bytes and a few hundred words, an image processor, and a chat template.

    Images become tokens, `fewest` to `most` of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(READ, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False))
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    raw.save(str(folder / "tokenizer.json"))
    held = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(held["model"]["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in held["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]))
    added = {
        str(raw.token_to_id(token)): {
            "content": token, "special": True, "lstrip": False, "rstrip": False, "normalized": False,
            "single_word": False,
        }
        for token in CONTROL
    }  # fmt: skip
    names = {
        "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "additional_special_tokens": CONTROL[1:],
        "bos_token": None, "unk_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "padding_side": "left", "add_prefix_space": False, "model_max_length": 32768, "errors": "replace",
        "split_special_tokens": False, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    area = (2 * SIDES[family]) ** 2
    pixels = {
        "image_processor_type": "Qwen2VLImageProcessor", "min_pixels": fewest * area, "max_pixels": most * area,
        "size": {"shortest_edge": fewest * area, "longest_edge": most * area}, "patch_size": SIDES[family],
        "temporal_patch_size": 2, "merge_size": 2, "image_mean": MEAN, "image_std": STD,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return raw


def base(folder, family="qwen2_vl", **limits):
    """Write a configuration, and the tokenizer and image processor of its model; return the configuration."""
    raw = processor(folder, family, **limits)
    language = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "vocab_size": raw.get_vocab_size() + 8,
        "initializer_range": 0.3, "max_position_embeddings": 32768, "hidden_act": "silu", "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "bos_token_id": raw.token_to_id("<|endoftext|>"), "eos_token_id": raw.token_to_id("<|im_end|>"),
    }  # fmt: skip
    visual = {
        "qwen2_vl": {
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "in_chans": 3,
            "spatial_patch_size": 14,
        },
        "qwen2_5_vl": {
            "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "in_chans": 3, "spatial_patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1],
        },
        "qwen3_vl": {
            "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
        },
    }[family]  # fmt: skip
    visual |= {"patch_size": SIDES[family], "spatial_merge_size": 2, "temporal_patch_size": 2}
    names = {
        "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
        "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    }  # fmt: skip
    config = {
        "model_type": family, "tie_word_embeddings": False, "vision_config": visual | {"initializer_range": 0.3},
        **{name: raw.token_to_id(token) for name, token in names.items()},
    }  # fmt: skip
    if family == "qwen3_vl":
        language["rope_scaling"] = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
        config["text_config"] = language | {"head_dim": 16}
    else:  # flat, as published
        config |= language
    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder)


def vlm(folder, family):
    """Write a model with its processor, to which an image is 1 to 16 tokens."""
    config = base(folder, family, fewest=1, most=16)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder


def published(state):
    """Return the tensors of a Qwen2-VL by their names in transformers 4.45."""
    return {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
        for name, value in state.items()
    }


def hpsv3(folder):
    """Write HPSv3.safetensors, a model in bfloat16 with its head in float32, beside what it takes of its base."""
    config = base(folder)
    torch.manual_seed(0)
    body = AutoModelForImageTextToText.from_config(config)
    width = config.get_text_config().hidden_size
    body.resize_token_embeddings(config.get_text_config().vocab_size - 8 + 1, mean_resizing=False)
    state = {name: value.bfloat16() for name, value in published(body.state_dict()).items()}
    head = torch.nn.Sequential(
        torch.nn.Linear(width, 1024), torch.nn.ReLU(), torch.nn.Dropout(0.05), torch.nn.Linear(1024, 16),
        torch.nn.ReLU(), torch.nn.Linear(16, 2),
    )  # fmt: skip
    state |= {f"rm_head.{name}": value * 3 for name, value in head.state_dict().items()}
    save_file({name: value.clone() for name, value in state.items()}, folder / "HPSv3.safetensors")
    return folder
