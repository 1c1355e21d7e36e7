"""Relatives of Flux: Chroma, Ovis-Image, Krea 2, VisualCloze, Bria, Fibo, LongCat-Image, DreamLite."""

from __future__ import annotations

import json
import string
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from tiny import flux

from . import Case, autoencoder_kl, image, mask, noise, pipeline
from .flux2 import autoencoder as flux2_autoencoder

SIZE = {"height": 16, "width": 24}
ATTENTION = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
PACKED = {"patch_size": 1, "in_channels": 16, **ATTENTION, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 8)}
TEXT = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}


def scheduler(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 3.0, "use_dynamic_shifting": True} | config))


def assemble(name: str, transformer: Any, vae: Any, **components: Any) -> Any:
    missing = dict.fromkeys(("text_encoder", "tokenizer"))
    common = {"transformer": transformer, "vae": vae, "scheduler": scheduler()}
    return pipeline(name, **(missing | common | components))


def tokenizer() -> Any:
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    vocab = {token: i for i, token in enumerate([*marks, *string.printable[:95], "Ġ", "Ċ"])}
    return transformers.Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=marks[1:])


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray((255 * image(height, width)[0].permute(1, 2, 0)).byte().numpy())


def t5() -> dict[str, Any]:
    # For pipelines that do not repeat given embeddings, or their masks, for more images.
    encoders = flux().components
    return {"text_encoder": encoders["text_encoder_2"], "tokenizer": encoders["tokenizer_2"]}


def t5_call(**more: Any) -> dict[str, Any]:
    return {"prompt": "a cat", "negative_prompt": "b", "max_sequence_length": 8} | SIZE | more


def chroma(name: str) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about what diffusers itself uses there
        transformer = diffusers.ChromaTransformer2DModel(
            **PACKED, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1
        )
    transformer.register_to_config(guidance_embeds=False)  # inpainting reads it from the configuration
    return assemble(name, transformer, autoencoder_kl(shift_factor=0.1), scheduler=scheduler(shift=1.0), **t5())


def chroma_image() -> dict[str, Any]:
    return t5_call(image=image(16, 24), strength=0.6)


def chroma_inpaint() -> dict[str, Any]:
    return chroma_image() | {"mask_image": mask(16, 24)}


def ovis() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.OvisImageTransformer2DModel(**PACKED, out_channels=16)
    return assemble("OvisImagePipeline", transformer, autoencoder_kl(shift_factor=0.1))


def ovis_call() -> dict[str, Any]:
    negative = {"negative_prompt": None, "negative_prompt_embeds": noise(1, 8, 16, seed=1)}
    return {"prompt_embeds": noise(1, 8, 16)} | negative | SIZE


def krea() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=0, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.2, 0.8, 1.0, 1.1],
    )  # fmt: skip
    return assemble("Krea2Pipeline", transformer, vae, text_encoder_select_layers=(1, 2))


def krea_call() -> dict[str, Any]:
    call = {"prompt_embeds": noise(1, 8, 2, 16), "negative_prompt_embeds": noise(1, 8, 2, 16, seed=1)}
    masks = dict.fromkeys(("prompt_embeds_mask", "negative_prompt_embeds_mask"), torch.ones(1, 8).bool())
    return call | masks | SIZE


def visual_cloze() -> Any:
    encoders = flux().components  # it ignores embeddings
    names = "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"
    transformer = diffusers.FluxTransformer2DModel(
        **(PACKED | {"in_channels": 48}), out_channels=16, pooled_projection_dim=16, guidance_embeds=True
    )
    return assemble(
        "VisualClozeGenerationPipeline", transformer, autoencoder_kl(shift_factor=0.1), resolution=16,
        **{name: encoders[name] for name in names},
    )  # fmt: skip


def visual_cloze_call() -> dict[str, Any]:
    example, query = [picture(16, 24), picture(16, 24)], [picture(16, 24), None]
    return {"task_prompt": "a", "content_prompt": "b", "image": [example, query], "max_sequence_length": 8}


def bria() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.BriaTransformer2DModel(**PACKED)
    return assemble("BriaPipeline", transformer, autoencoder_kl(shift_factor=0.0), **t5())


def fibo(name: str) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.BriaFiboTransformer2DModel(
        **(PACKED | {"in_channels": 4, "joint_attention_dim": 32}), text_encoder_dim=16
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, in_channels=12, out_channels=12, patch_size=2,
        is_residual=True, scale_factor_spatial=16, latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.2, 0.8, 1.0, 1.1],
    )  # fmt: skip
    words = tokenizer()
    config = transformers.SmolLM3Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    return assemble(name, transformer, vae, text_encoder=transformers.SmolLM3ForCausalLM(config), tokenizer=words)


def fibo_call(**more: Any) -> dict[str, Any]:
    # Without a negative prompt it takes a token of a larger vocabulary.
    return {"prompt": "a cat", "negative_prompt": "b", "height": 32, "width": 48} | more


def fibo_edit() -> dict[str, Any]:
    return fibo_call(prompt=json.dumps({"edit_instruction": "a"}), image=picture(32, 48))


def fibo2() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=16, injection_layer_ids=(1,),
        perceiver_num_layers=1, min_num_gist_tokens=2, max_num_gist_tokens=4, gist_step=2, gist_min_text_len=4,
        gist_max_text_len=16, axes_dims=(4, 4, 8), axes_lens=(64, 32, 32),
    )  # fmt: skip
    parts = {"transformer": transformer, "vae": flux2_autoencoder(), "scheduler": scheduler()}
    pipe = pipeline("BriaFibo2Pipeline", **parts, text_encoder=None, processor=None)
    pipe.text_encoder_out_layers = ((1, 2), (2, 3))
    return pipe


def fibo2_call() -> dict[str, Any]:
    return {"prompt_embeds": noise(1, 2, 8, 16), "negative_prompt_embeds": noise(1, 2, 6, 16, seed=1)} | SIZE


@dataclass
class Processor:
    """All that LongCat-Image reads of a processor of images and text; a real one needs torchvision for its videos."""

    image_processor: Any


def longcat(name: str, halvings: int = 1) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.LongCatImageTransformer2DModel(**(PACKED | {"in_channels": 64}), pooled_projection_dim=16)
    levels = halvings + 1
    vae = autoencoder_kl(
        16, shift_factor=0.1, layers_per_block=1, block_out_channels=(4,) * levels, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
    )  # fmt: skip
    words = tokenizer()
    marks = {f"{mark}_token_id": words.convert_tokens_to_ids(f"<|{mark}|>") for mark in ("vision_start", "vision_end")}
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | {"vocab_size": len(words), "rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}},
        vision_config=VISION, image_token_id=words.convert_tokens_to_ids("<|image_pad|>"), **marks,
    )  # fmt: skip
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(config)
    processor = Processor(transformers.Qwen2VLImageProcessorPil(max_pixels=56 * 56))
    pipe = assemble(name, transformer, vae, text_encoder=encoder, tokenizer=words, text_processor=processor)
    pipe.tokenizer_max_length = 8  # it pads every prompt to this
    return pipe


def longcat_call() -> dict[str, Any]:
    return {"prompt": "a cat", "enable_prompt_rewrite": False} | SIZE


def longcat_edit() -> dict[str, Any]:
    return {"prompt": "a cat", "image": picture(16, 64)}


def dreamlite(name: str) -> Any:
    torch.manual_seed(0)
    unet = diffusers.DreamLiteUNetModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"), cross_attention_dim=16,
    )  # fmt: skip
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    vae = diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), **blocks)
    words = tokenizer()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    config = transformers.Qwen3VLConfig(
        text_config=TEXT | {"vocab_size": len(words), "rope_scaling": rope},
        vision_config=VISION | {"deepstack_visual_indexes": []},
    )  # fmt: skip
    encoder = transformers.Qwen3VLForConditionalGeneration(config)
    parts = {"unet": unet, "vae": vae, "scheduler": scheduler(), "processor": None}
    return pipeline(name, **parts, text_encoder=encoder, tokenizer=words)


def dreamlite_call() -> dict[str, Any]:
    return {"prompt": "a cat"} | SIZE


def case(name: str, build: Callable[[], Any], call: Callable[[], Any], task: Any = "text", **networks: Any) -> Case:
    return Case(name, build, call, task=task, **networks)


UNET = {"networks": ("unet",)}
CASES = [
    case("ChromaPipeline", partial(chroma, "ChromaPipeline"), t5_call),
    case("ChromaImg2ImgPipeline", partial(chroma, "ChromaImg2ImgPipeline"), chroma_image, "image"),
    case("ChromaInpaintPipeline", partial(chroma, "ChromaInpaintPipeline"), chroma_inpaint, "inpaint"),
    case("OvisImagePipeline", ovis, ovis_call),
    case("Krea2Pipeline", krea, krea_call),
    case("VisualClozeGenerationPipeline", visual_cloze, visual_cloze_call, "edit"),
    case("BriaPipeline", bria, t5_call),
    case("BriaFiboPipeline", partial(fibo, "BriaFiboPipeline"), fibo_call),
    case("BriaFiboEditPipeline", partial(fibo, "BriaFiboEditPipeline"), fibo_edit, "edit"),
    case("BriaFibo2Pipeline", fibo2, fibo2_call),
    case("LongCatImagePipeline", partial(longcat, "LongCatImagePipeline"), longcat_call),
    # It makes a million pixels whatever is asked for: the more halvings, the fewer tokens.
    case("LongCatImageEditPipeline", partial(longcat, "LongCatImageEditPipeline", 6), longcat_edit, "edit"),
    case("DreamLitePipeline", partial(dreamlite, "DreamLitePipeline"), dreamlite_call, **UNET),
    case("DreamLiteMobilePipeline", partial(dreamlite, "DreamLiteMobilePipeline"), dreamlite_call, **UNET),
]
