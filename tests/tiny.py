"""Real diffusers pipelines at toy size, built offline with random weights."""

from __future__ import annotations

import string
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)  # fmt: skip

import checkpoints

TRANSFORMERS_5 = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="the scenes' tokenizers are files of transformers 5"
)
FLUX_CALL = {"height": 16, "width": 24, "max_sequence_length": 8}
SD_CALL = {"height": 16, "width": 24}

SD_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def clip_text() -> tuple[CLIPTextModel, CLIPTokenizer]:
    with TemporaryDirectory() as folder:
        tokenizer = CLIPTokenizer.from_pretrained(checkpoints.clip_processor(Path(folder)))
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=52, eos_token_id=53, pad_token_id=53, projection_dim=16,
    )  # fmt: skip
    return CLIPTextModel(config).eval(), tokenizer


def t5_tokenizer() -> PreTrainedTokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in string.ascii_lowercase)]
    raw = Tokenizer(models.Unigram(pieces, unk_id=2))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def vae(shift_factor: float | None) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
        scaling_factor=0.7, shift_factor=shift_factor,
    ).eval()  # fmt: skip


def flux(cls: type = FluxPipeline, **scheduler):
    torch.manual_seed(0)
    text_encoder, tokenizer = clip_text()
    tokenizer_2 = t5_tokenizer()
    t5 = T5Config(vocab_size=len(tokenizer_2), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(**({"use_dynamic_shifting": True} | scheduler)),
        vae=vae(0.1), text_encoder=text_encoder, tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(), tokenizer_2=tokenizer_2, transformer=transformer.eval(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd(cls: type = StableDiffusionPipeline, scheduler=None, **config):
    torch.manual_seed(0)
    text_encoder, tokenizer = clip_text()
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    pipe = cls(
        scheduler=scheduler or DDIMScheduler(**(SD_SCHEDULER | config)),
        vae=vae(None), text_encoder=text_encoder, tokenizer=tokenizer, unet=unet.eval(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_img2img():
    return flux(FluxImg2ImgPipeline)


def flux_inpaint():
    return flux(FluxInpaintPipeline)


def sd_inpaint():
    return sd(StableDiffusionInpaintPipeline)


def sd_img2img():
    return sd(StableDiffusionImg2ImgPipeline)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
