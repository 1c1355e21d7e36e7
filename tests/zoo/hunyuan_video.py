"""HunyuanVideo, its image-to-video variants, FramePack and HunyuanVideo 1.5."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from . import Case, noise, pipeline
from .wan import picture

HEIGHT, WIDTH = 16, 32
TOKENS, TEXT = 6, 16


def flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 7.0} | config))


def siglip() -> dict[str, Any]:
    config = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2
    )
    return {
        "image_encoder": SiglipVisionModel(config),
        "feature_extractor": SiglipImageProcessor(size={"height": 4, "width": 4}),
    }


def build(
    name: str, channels: int = 4, scheduler: Any = None, network: dict[str, Any] | None = None, **more: Any
) -> Any:
    torch.manual_seed(0)
    framepack = name == "HunyuanVideoFramepackPipeline"
    transformer = getattr(diffusers, "HunyuanVideo" + "Framepack" * framepack + "Transformer3DModel")(
        in_channels=channels, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=TEXT,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4), **(network or {}),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    components = {"transformer": transformer, "vae": vae, "scheduler": scheduler or flow()}
    texts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return pipeline(name, **(components | texts | more))


def llama_3() -> Any:
    """Return a tokenizer that cuts the template into as many tokens as that of Llama 3: its words are whole tokens."""
    marks = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>", "<pad>"]
    raw = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n+|\s"), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=marks, initial_alphabet=letters, show_progress=False)
    words = DEFAULT_PROMPT_TEMPLATE["template"]
    for mark in (*marks, "{}"):
        words = words.replace(mark, "\n\n")
    raw.train_from_iterator([words], trainer)
    raw.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[(marks[0], 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=marks[0], eos_token="<|eot_id|>", pad_token="<pad>",
        extra_special_tokens=marks[1:5],
    )  # fmt: skip


def llava() -> dict[str, Any]:
    """Return Llava, which sees 24 × 24 patches as the template says, with its tokenizer and processor."""
    tokenizer = llama_3()
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=48, patch_size=2
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id, bos_token_id=0, eos_token_id=3,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1)
    config.pad_token_id = tokenizer.pad_token_id
    return {
        "text_encoder": LlavaForConditionalGeneration(config),
        "tokenizer": tokenizer,
        "image_processor": CLIPImageProcessor(size={"height": 48, "width": 48}, do_center_crop=False),
    }


def text_to_video() -> Any:
    return build("HunyuanVideoPipeline")


def image_to_video() -> Any:
    network = {"image_condition_type": "latent_concat", "guidance_embeds": False}
    return build("HunyuanVideoImageToVideoPipeline", 2 * 4 + 1, network=network, **llava())


def image_to_video_replacing_tokens() -> Any:
    network = {"image_condition_type": "token_replace"}
    return build("HunyuanVideoImageToVideoPipeline", network=network, **llava())


def skyreels() -> Any:
    return build("HunyuanSkyreelsImageToVideoPipeline", 2 * 4)


def framepack() -> Any:
    network = {"has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True}
    scheduler = flow(shift=1.0, use_dynamic_shifting=True)
    return build("HunyuanVideoFramepackPipeline", 4, scheduler, network, **siglip())


def build_15(name: str, task: str, **more: Any) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=2 * 4 + 1, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=TEXT, text_embed_2_dim=TEXT, image_embed_dim=8,
        rope_axes_dim=(2, 2, 4), target_size=16, task_type=task,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    texts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    components = {"transformer": transformer, "vae": vae, "scheduler": flow(shift=5.0), "guider": guider}
    return pipeline(name, **components, **texts, **more)


def text_to_video_15() -> Any:
    return build_15("HunyuanVideo15Pipeline", "t2v")


def image_to_video_15() -> Any:
    return build_15("HunyuanVideo15ImageToVideoPipeline", "i2v", **siglip())


def embeds(prefix: str = "", seed: int = 0) -> dict[str, Any]:
    return {
        f"{prefix}prompt_embeds": noise(1, TOKENS, TEXT, seed=seed),
        f"{prefix}pooled_prompt_embeds": noise(1, 8, seed=seed),
        f"{prefix}prompt_attention_mask": torch.ones(1, TOKENS),
    }


def call(**more: Any) -> dict[str, Any]:
    return {"height": HEIGHT, "width": WIDTH, "num_frames": 5, **embeds(), **more}


def image_call() -> dict[str, Any]:
    # the first four frames are cut off after decoding
    return call(image=picture(), num_frames=9, true_cfg_scale=3.0, **embeds("negative_", 1))


def replacing_call() -> dict[str, Any]:
    return call(image=picture(), guidance_scale=6.0)


def skyreels_call() -> dict[str, Any]:
    return call(image=picture(), **embeds("negative_", 1))


def framepack_call() -> dict[str, Any]:
    # two sections, so that the loop runs twice
    return call(image=picture(), num_frames=9, latent_window_size=2)


def framepack_forward_call() -> dict[str, Any]:
    return framepack_call() | {"sampling_type": "vanilla"}


def embeds_15(prefix: str = "", seed: int = 0) -> dict[str, Any]:
    states = {"": noise(1, TOKENS, TEXT, seed=seed), "_2": noise(1, TOKENS, TEXT, seed=seed + 2)}
    masks = {f"{prefix}prompt_embeds_mask{end}": torch.ones(1, TOKENS, dtype=torch.int64) for end in states}
    return {f"{prefix}prompt_embeds{end}": state for end, state in states.items()} | masks


def call_15() -> dict[str, Any]:
    return {"height": 16, "width": 24, "num_frames": 5, **embeds_15(), **embeds_15("negative_", 1)}


def image_call_15() -> dict[str, Any]:
    return {"image": picture(16, 24), "num_frames": 5, **embeds_15(), **embeds_15("negative_", 1)}


CASES = [
    Case("HunyuanVideoPipeline", text_to_video, call),
    Case("HunyuanVideoImageToVideoPipeline", image_to_video, image_call, task="video"),
    Case(
        "HunyuanVideoImageToVideoPipeline",
        image_to_video_replacing_tokens,
        replacing_call,
        task="video",
        variant="token_replace",
    ),
    Case("HunyuanSkyreelsImageToVideoPipeline", skyreels, skyreels_call, task="video"),
    Case("HunyuanVideoFramepackPipeline", framepack, framepack_call, task="video"),
    Case("HunyuanVideoFramepackPipeline", framepack, framepack_forward_call, task="video", variant="forward"),
    Case("HunyuanVideo15Pipeline", text_to_video_15, call_15),
    Case("HunyuanVideo15ImageToVideoPipeline", image_to_video_15, image_call_15, task="video"),
]
