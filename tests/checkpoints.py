"""Checkpoints of every reward at toy size, with random weights, in the files and formats of the published ones."""

import json
import string

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)  # fmt: skip

from published import Head, OpenCLIP, PublishedImageReward

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's
OWN_MEAN, OWN_STD = [0.4, 0.5, 0.6], [0.3, 0.25, 0.2]  # those of the processor written here
SIZE = 16  # of the images that the networks see


def clip_processor(folder):
    """Write the tokenizer and the image processor of a CLIP of 54 tokens, 16 of which make a prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {
        "bos_token": "<|startoftext|>",
        **dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    }
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    pixels = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": SIZE}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": OWN_MEAN, "image_std": OWN_STD,
        "do_convert_rgb": True,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


def clip(folder, **files):
    """Write a CLIPModel and its processor."""
    torch.manual_seed(0)
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        projection_dim=12,
        vision_config={**common, "image_size": SIZE, "patch_size": 4},
        text_config={**common, "vocab_size": 54, "max_position_embeddings": 16, "bos_token_id": 52, "eos_token_id": 53,
                     "pad_token_id": 53},
    )  # fmt: skip
    model = CLIPModel(config)
    torch.nn.init.normal_(model.visual_projection.weight)
    torch.nn.init.normal_(model.text_projection.weight)
    model.save_pretrained(clip_processor(folder))
    return folder


def hpsv2(folder):
    """Write a checkpoint of open_clip, in half precision, as HPS_v2.1_compressed.pt is."""
    torch.manual_seed(0)
    state = {name: value.half() for name, value in OpenCLIP().state_dict().items()}
    torch.save({"epoch": 1, "name": "hps", "state_dict": state}, clip_processor(folder) / "HPS_v2.1_compressed.pt")
    return folder


def aesthetic(folder):
    """Write a head beside its CLIP."""
    clip(folder)
    torch.save(Head(12).state_dict(), folder / "aesthetic-model.pth")
    return folder


def image_reward(folder):
    """Write ImageReward.pt and a vocabulary of BERT's kind."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.save(PublishedImageReward().state_dict(), folder / "ImageReward.pt")
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    return folder


WORDS = ["<pad>", "<unk>", "<s>", "<image>", "USER", "ASSISTANT", ":", "Does", "this", "image", "show", '"', "?",
         "Answer", "Yes", "or", "No", ".", "a", "red", "circle", "blue", "square", "two", "squares"]  # fmt: skip
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def word_tokenizer():
    """Return a tokenizer of whole words that begins every text with <s>."""
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=["<image>"], **names)


def vlm(folder):
    """Write a LLaVA of words, with its processor and a chat template."""
    torch.manual_seed(0)
    clip_processor(folder)
    template = (
        "{% for m in messages %}USER : {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT :{% endif %}"
    )
    LlavaProcessor(
        image_processor=CLIPImageProcessor.from_pretrained(folder), tokenizer=word_tokenizer(), patch_size=4,
        vision_feature_select_strategy="default", chat_template=template, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**WIDTHS, image_size=SIZE, patch_size=4),
        text_config=LlamaConfig(**WIDTHS, vocab_size=len(WORDS), pad_token_id=0, bos_token_id=2),
        image_token_index=3, vision_feature_layer=-1, image_seq_length=16,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def blip2(folder, language):
    """Write a BLIP-2 of words with "opt" or "t5", which has no chat template."""
    torch.manual_seed(0)
    text = {
        "opt": OPTConfig(
            hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(WORDS),
            word_embed_proj_dim=32, max_position_embeddings=128,
        ),
        "t5": T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=len(WORDS)),
    }[language]  # fmt: skip
    pixels = BlipImageProcessor(size={"height": SIZE, "width": SIZE})
    Blip2Processor(pixels, word_tokenizer(), num_query_tokens=4).save_pretrained(folder)
    config = Blip2Config(
        vision_config={**WIDTHS, "image_size": SIZE, "patch_size": 4}, text_config=text.to_dict(), num_query_tokens=4,
        qformer_config={**WIDTHS, "encoder_hidden_size": 32, "vocab_size": len(WORDS)}, image_token_index=3,
    )  # fmt: skip
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    return folder
