"""Checkpoints of CLAP at toy size, with random weights, in the files of the published ones."""

import json
import string

import torch
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

SECONDS, RATE = 1, 48_000  # of what the model hears at once
PUBLISHED = {  # laion/clap-htsat-fused, whose feature extractor hears ten seconds
    "feature_size": 64, "sampling_rate": RATE, "hop_length": 480, "max_length_s": 10, "fft_window_size": 1024,
    "frequency_min": 50, "frequency_max": 14_000, "top_db": None, "padding": "repeatpad", "padding_value": 0.0,
}  # fmt: skip


def roberta_tokenizer(folder):
    """Write a tokenizer of RoBERTa's kind, of letters and a few marks."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *string.ascii_lowercase, "Ġ", "<", "/", ">", "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    config = {"tokenizer_class": "RobertaTokenizer", "model_max_length": 512, "processor_class": "ClapProcessor"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | names))
    return len(words)


def clap(folder, fused=False):
    """Write a ClapModel that hears a second of 16 mels, with its tokenizer and feature extractor."""
    folder.mkdir(parents=True, exist_ok=True)
    words = roberta_tokenizer(folder)
    own = {"feature_size": 16, "max_length_s": SECONDS, "truncation": "fusion" if fused else "rand_trunc"}
    ClapFeatureExtractor(**PUBLISHED | own).save_pretrained(folder)
    torch.manual_seed(0)
    text = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
        "vocab_size": words, "max_position_embeddings": 34, "projection_dim": 12,
    }  # fmt: skip
    audio = {
        "enable_fusion": fused, "fusion_type": "aff_2d" if fused else None, "enable_patch_layer_norm": True,
        "spec_size": 64, "num_mel_bins": 16, "patch_embeds_hidden_size": 8, "depths": [1, 1], "aff_block_r": 4,
        "num_attention_heads": [2, 2], "hidden_size": 16, "projection_dim": 12, "fusion_num_hidden_layers": 1,
    }  # fmt: skip
    model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=12))
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "position" not in name:
            torch.nn.init.normal_(weight, std=0.3)
    norm = model.audio_model.audio_encoder.batch_norm
    norm.running_mean, norm.running_var = torch.full((16,), -20.0), torch.full((16,), 50.0)  # of decibels
    model.save_pretrained(folder)
    return folder
