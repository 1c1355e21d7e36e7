"""DeepFloyd IF: diffusion in pixels with learned variances, and its super-resolution stages."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from zoo import Case, image, mask, noise, pipeline

TOKENS, WIDTH = 5, 16
NAMES = ("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker")


def unet(**config: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=16, out_channels=6, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=32, encoder_hid_dim=WIDTH, attention_head_dim=8, addition_embed_type="text",
        addition_embed_type_num_heads=2, cross_attention_norm="group_norm", resnet_time_scale_shift="scale_shift",
        act_fn="gelu", **config,
    )  # fmt: skip


def scheduler(maximum: float) -> Any:
    return diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True,
        dynamic_thresholding_ratio=0.95, sample_max_value=maximum,
    )  # fmt: skip


def base(name: str) -> Any:
    torch.manual_seed(0)
    absent = dict.fromkeys(NAMES)
    return pipeline(name, unet=unet(in_channels=3), scheduler=scheduler(1.5), requires_safety_checker=False, **absent)


def upscaler(name: str) -> Any:
    torch.manual_seed(0)
    network = unet(
        in_channels=6, class_embed_type="timestep", mid_block_scale_factor=1.414, time_embedding_act_fn="gelu",
        time_embedding_dim=16,
    )  # fmt: skip
    noising = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    return pipeline(
        name, unet=network, scheduler=scheduler(1.0), image_noising_scheduler=noising,
        requires_safety_checker=False, **dict.fromkeys(NAMES),
    )  # fmt: skip


def prompt() -> dict[str, Any]:
    return {"prompt_embeds": noise(1, TOKENS, WIDTH), "negative_prompt_embeds": noise(1, TOKENS, WIDTH, seed=1)}


def signed(height: int, width: int, seed: int = 0) -> Any:
    return 2 * image(height, width, seed) - 1


UNET = ("unet",)

CASES = [
    Case("IFPipeline", lambda: base("IFPipeline"), lambda: prompt() | {"height": 16, "width": 24}, UNET),
    Case(
        "IFImg2ImgPipeline",
        lambda: base("IFImg2ImgPipeline"),
        lambda: prompt() | {"image": signed(16, 24), "strength": 0.6},
        UNET,
        "image",
    ),
    Case(
        "IFInpaintingPipeline",
        lambda: base("IFInpaintingPipeline"),
        lambda: prompt() | {"image": signed(16, 24), "mask_image": mask(16, 24), "strength": 0.9},
        UNET,
        "inpaint",
    ),
    Case(
        "IFSuperResolutionPipeline",
        lambda: upscaler("IFSuperResolutionPipeline"),
        lambda: prompt() | {"image": signed(8, 12), "height": 16, "width": 24},
        UNET,
        "upscale",
    ),
    Case(
        "IFImg2ImgSuperResolutionPipeline",
        lambda: upscaler("IFImg2ImgSuperResolutionPipeline"),
        lambda: prompt() | {"image": signed(8, 12), "original_image": signed(16, 24, 1), "strength": 0.6},
        UNET,
        "image",
    ),
    Case(
        "IFInpaintingSuperResolutionPipeline",
        lambda: upscaler("IFInpaintingSuperResolutionPipeline"),
        lambda: (
            prompt()
            | {"image": signed(8, 12), "original_image": signed(16, 24, 1), "mask_image": mask(16, 24), "strength": 0.9}
        ),
        UNET,
        "inpaint",
    ),
]
