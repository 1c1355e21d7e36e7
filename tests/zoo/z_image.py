"""Z-Image: generation, image-to-image, inpainting, control, several images (Omni)."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from . import Case, autoencoder_kl, image, mask, noise, pipeline
from .qwen import awake, picture

SIZE = {"height": 16, "width": 24}
BLOCKS = {"dim": 16, "n_heads": 2, "n_kv_heads": 2, "n_refiner_layers": 1}


def z_image(name: str, siglip_feat_dim: int | None = None, shift: float = 3.0, **components: Any) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, n_layers=1, cap_feat_dim=16, siglip_feat_dim=siglip_feat_dim, axes_dims=[4, 2, 2],
        axes_lens=[256, 64, 64], **BLOCKS,
    )  # fmt: skip
    if name.startswith("ZImageControlNet"):
        # A control of the latents, a mask and the latents of a masked image.
        controlnet = diffusers.ZImageControlNetModel(
            control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=9,
            add_control_noise_refiner="control_layers", **BLOCKS,
        )  # fmt: skip
        components["controlnet"] = awake(controlnet)
    parts = {"vae": autoencoder_kl(shift_factor=0.1), "transformer": awake(transformer), "text_encoder": None}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return pipeline(name, **(parts | {"tokenizer": None, "scheduler": scheduler} | components))


def omni() -> Any:
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    config = Siglip2VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_patches=16, patch_size=4
    )
    pipe = z_image(
        "ZImageOmniPipeline", siglip_feat_dim=16, siglip=Siglip2VisionModel(config),
        siglip_processor=Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16),
    )  # fmt: skip
    pipe.vae.bfloat16()  # It is given images in this type whatever its own.
    return pipe


def call(**more: Any) -> dict[str, Any]:
    embeds = {"prompt_embeds": [noise(5, 16)], "negative_prompt_embeds": [noise(3, 16, seed=1)]}
    return embeds | SIZE | {"guidance_scale": 2.0} | more


def call_omni() -> dict[str, Any]:
    # What comes before the image, between it and the one to be made, and after.
    embeds = {"prompt_embeds": [[noise(n, 16, seed=n) for n in (3, 5, 2)]]}
    return call(image=[picture(64, 80)], negative_prompt_embeds=[[noise(n, 16, seed=n) for n in (3, 4, 2)]], **embeds)


CASES = [
    Case("ZImagePipeline", partial(z_image, "ZImagePipeline", shift=6.0), call),
    Case(
        "ZImageImg2ImgPipeline",
        partial(z_image, "ZImageImg2ImgPipeline"),
        lambda: call(image=image(16, 24), strength=0.6),
        task="image",
    ),
    Case(
        "ZImageInpaintPipeline",
        partial(z_image, "ZImageInpaintPipeline"),
        lambda: call(image=image(16, 24), mask_image=mask(16, 24), strength=0.6),
        task="inpaint",
    ),
    Case(
        "ZImageControlNetPipeline",
        partial(z_image, "ZImageControlNetPipeline"),
        lambda: call(control_image=image(16, 24)),
        networks=("transformer", "controlnet"),
        task="control",
    ),
    Case(
        "ZImageControlNetInpaintPipeline",
        partial(z_image, "ZImageControlNetInpaintPipeline"),
        lambda: call(image=image(16, 24), mask_image=mask(16, 24), control_image=image(16, 24, seed=1)),
        networks=("transformer", "controlnet"),
        task="control",
    ),
    Case("ZImageOmniPipeline", omni, call_omni, task="edit"),
]
