"""Kandinsky 2.1 and 2.2: decoders that start from image embeddings, and the priors that make those from text."""

from __future__ import annotations

import string
from typing import Any

import diffusers
import torch
from transformers import CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers import XLMRobertaTokenizer as Tokenizer

from tiny import clip_text
from zoo import Case, image, mask, noise, pipeline

SIZE = {"height": 16, "width": 24}
WIDTH = 16  # of every embedding

DDIM = {
    "beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012,
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
DDPM = {
    "beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012,
    "variance_type": "learned_range", "thresholding": True, "sample_max_value": 2.0,
}  # fmt: skip


def movq() -> Any:
    return diffusers.VQModel(
        block_out_channels=(32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8, norm_type="spatial",
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), num_vq_embeddings=12, vq_embed_dim=4,
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    )  # fmt: skip


def unet(condition: str, encoder: str, in_channels: int) -> Any:
    return diffusers.UNet2DConditionModel(
        in_channels=in_channels, out_channels=8, addition_embed_type=condition, encoder_hid_dim_type=encoder,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), sample_size=8,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", block_out_channels=(8, 16), layers_per_block=1,
        encoder_hid_dim=WIDTH, cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip


def multilingual_clip() -> tuple[Any, Any]:
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "▁", *string.ascii_lowercase]
    config = MCLIPConfig(
        transformerDimSize=WIDTH, imageDimSize=WIDTH, hidden_size=WIDTH, intermediate_size=24, num_attention_heads=2,
        num_hidden_layers=1, vocab_size=len(pieces), max_position_embeddings=80,
    )  # fmt: skip
    return MultilingualCLIP(config), Tokenizer(vocab=[(piece, -1.0) for piece in pieces], model_max_length=77)


def decoder_21(name: str, in_channels: int = 4) -> Any:
    torch.manual_seed(0)
    text_encoder, tokenizer = multilingual_clip()
    return pipeline(
        name, text_encoder=text_encoder, tokenizer=tokenizer, movq=movq(),
        unet=unet("text_image", "text_image_proj", in_channels), scheduler=diffusers.DDIMScheduler(**DDIM),
    )  # fmt: skip


def decoder_22(name: str, condition: str = "image", in_channels: int = 4, ddim: bool = False) -> Any:
    torch.manual_seed(0)
    scheduler = diffusers.DDIMScheduler(**DDIM) if ddim else diffusers.DDPMScheduler(**DDPM)
    return pipeline(name, unet=unet(condition, "image_proj", in_channels), movq=movq(), scheduler=scheduler)


def prior(name: str) -> Any:
    torch.manual_seed(0)
    text, tokenizer = clip_text()
    transformer = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=WIDTH, num_embeddings=16
    )
    torch.nn.init.ones_(transformer.clip_std)  # zero without a checkpoint, and so every embedding
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, projection_dim=WIDTH, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1,
        image_size=8, patch_size=4,
    )  # fmt: skip
    scheduler = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0
    )
    return pipeline(
        name, prior=transformer, image_encoder=CLIPVisionModelWithProjection(vision), tokenizer=tokenizer,
        text_encoder=CLIPTextModelWithProjection(text.config), scheduler=scheduler, image_processor=None,
    )  # fmt: skip


def embeddings() -> dict[str, Any]:
    return {"image_embeds": noise(1, WIDTH), "negative_image_embeds": noise(1, WIDTH, seed=1)} | SIZE


def start() -> dict[str, Any]:
    # Square: these pipelines hand width and height to their image processor the wrong way round.
    return embeddings() | {"image": image(16, 16), "strength": 0.6, "height": 16, "width": 16}


def hole() -> dict[str, Any]:
    return {"image": 2 * image(16, 24) - 1, "mask_image": mask(16, 24)}


def hint(height: int, width: int) -> dict[str, Any]:
    return {"hint": image(height, width, seed=1)}  # the network shrinks it eightfold


UNET, PRIOR = ("unet",), ("prior",)
TEXT = {"prompt": "a horse"}

CASES = [
    Case("KandinskyPipeline", lambda: decoder_21("KandinskyPipeline"), lambda: TEXT | embeddings(), UNET),
    Case(
        "KandinskyImg2ImgPipeline",
        lambda: decoder_21("KandinskyImg2ImgPipeline"),
        lambda: TEXT | start(),
        UNET,
        "image",
    ),
    Case(
        "KandinskyInpaintPipeline",
        lambda: decoder_21("KandinskyInpaintPipeline", in_channels=9),
        lambda: TEXT | embeddings() | hole(),
        UNET,
        "inpaint",
    ),
    Case("KandinskyPriorPipeline", lambda: prior("KandinskyPriorPipeline"), lambda: dict(TEXT), PRIOR),
    Case("KandinskyV22Pipeline", lambda: decoder_22("KandinskyV22Pipeline"), embeddings, UNET),
    Case(
        "KandinskyV22ControlnetPipeline",
        lambda: decoder_22("KandinskyV22ControlnetPipeline", "image_hint", 8),
        lambda: embeddings() | hint(64, 96),
        UNET,
        "control",
    ),
    Case(
        "KandinskyV22ControlnetImg2ImgPipeline",
        lambda: decoder_22("KandinskyV22ControlnetImg2ImgPipeline", "image_hint", 8),
        lambda: start() | hint(64, 64),
        UNET,
        "image",
    ),
    Case(
        "KandinskyV22Img2ImgPipeline",
        lambda: decoder_22("KandinskyV22Img2ImgPipeline", ddim=True),
        start,
        UNET,
        "image",
    ),
    Case(
        "KandinskyV22InpaintPipeline",
        lambda: decoder_22("KandinskyV22InpaintPipeline", in_channels=9),
        lambda: embeddings() | hole(),
        UNET,
        "inpaint",
    ),
    Case("KandinskyV22PriorPipeline", lambda: prior("KandinskyV22PriorPipeline"), lambda: dict(TEXT), PRIOR),
    Case(
        "KandinskyV22PriorEmb2EmbPipeline",
        lambda: prior("KandinskyV22PriorEmb2EmbPipeline"),
        lambda: TEXT | {"image": noise(1, WIDTH), "strength": 0.6},
        PRIOR,
        "image",
    ),
]
