"""Checkpoints of models that read, at toy size, with random weights, in the files of the published ones."""

import json
import string

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    PreTrainedTokenizerFast,
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

SIZE = 16  # of the images that TrOCR sees


def image_processor(folder, kind, size):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = {
        "image_processor_type": kind, "do_resize": True, "size": {"height": size, "width": size}, "resample": 2,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3, "do_convert_rgb": True,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))


def letter_tokenizer(folder, processor, special, **names):
    """Write a tokenizer of letters after special tokens, and return how many tokens it has."""
    letters = [*string.ascii_lowercase, *string.ascii_uppercase, *string.digits, *".:,?!-", "Ġ", "Ċ"]
    vocab = {token: i for i, token in enumerate([*special, *letters])}
    raw = Tokenizer(models.BPE(vocab, [], unk_token=names["unk_token"]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        model_input_names=["input_ids", "attention_mask"],
        additional_special_tokens=special,
        **names,
    )
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"processor_class": processor}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(tokenizer)


def loud(model, std):
    """Make the weights large, so that what is read depends on the image."""
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=std)
    return model


def trocr(folder):
    """Write a TrOCR: an encoder of images and a decoder of letters, and its processor."""
    image_processor(folder, "ViTImageProcessor", SIZE)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = letter_tokenizer(folder, "TrOCRProcessor", list(names.values()), **names)
    torch.manual_seed(0)
    encoder = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=SIZE, patch_size=4
    )
    decoder = TrOCRConfig(
        vocab_size=words, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24,
        max_position_embeddings=64, cross_attention_hidden_size=16,
    )  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 1, 2
    loud(VisionEncoderDecoderModel(config), 0.6).save_pretrained(folder)
    return folder


def got(folder):
    """Write a GOT-OCR 2, which sees 64 · 64 patches of a pixel, and its processor."""
    image_processor(folder, "GotOcr2ImageProcessor", 64)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"]
    names = {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    words = letter_tokenizer(folder, "GotOcr2Processor", special, **names)
    torch.manual_seed(0)
    vision = {
        "hidden_size": 8, "output_channels": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 64,
        "patch_size": 1, "window_size": 14, "global_attn_indexes": [], "mlp_dim": 12, "initializer_range": 0.02,
    }  # fmt: skip
    text = {
        "model_type": "qwen2", "vocab_size": words, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    config = GotOcr2Config(vision_config=vision, text_config=text, image_token_index=5, image_seq_length=256)
    loud(GotOcr2ForConditionalGeneration(config), 0.6).save_pretrained(folder)
    return folder
