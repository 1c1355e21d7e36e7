"""Stable Diffusion 1 and 2, their variants of one UNet, and the latent diffusion before them."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from tiny import SD_SCHEDULER, clip_text
from zoo import Case, autoencoder_kl, image, mask, noise, pipeline

HEIGHT, WIDTH = 16, 24
SIZE = {"height": HEIGHT, "width": WIDTH}
BETAS = {key: SD_SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule")}


def unet(**config: Any) -> Any:
    torch.manual_seed(0)
    blocks = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return diffusers.UNet2DConditionModel(**(blocks | config))


def scheduler(name: str = "PNDM", **config: Any) -> Any:
    """Return a scheduler with the noise levels of the Stable Diffusion checkpoints."""
    config = {"steps_offset": 1} | config
    if name == "PNDM":
        config |= {"skip_prk_steps": True, "set_alpha_to_one": False}
    if name == "DDIM":
        config |= {"clip_sample": False, "set_alpha_to_one": False}
    return getattr(diffusers, f"{name}Scheduler")(**BETAS, **config)


def build(name: str, sampler: Any = None, **components: Any) -> Any:
    base = {
        "unet": components.pop("unet", None) or unet(),
        "vae": components.pop("vae", None) or autoencoder_kl(),
        "scheduler": sampler or scheduler(),
        "text_encoder": None,
        "tokenizer": None,
    }
    return pipeline(name, **(base | components))


def checked(name: str, sampler: Any = None, **components: Any) -> Any:
    """Return a pipeline with a safety checker, switched off."""
    off = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return build(name, sampler, **(off | components))


def text() -> dict[str, Any]:
    return {"prompt_embeds": noise(1, 6, 16), "negative_prompt_embeds": noise(1, 6, 16, seed=1)}


def img2img() -> dict[str, Any]:
    return text() | {"image": image(HEIGHT, WIDTH), "strength": 0.6}


def inpaint() -> dict[str, Any]:
    return text() | SIZE | {"image": image(HEIGHT, WIDTH), "mask_image": mask(HEIGHT, WIDTH)}


def vision() -> Any:
    torch.manual_seed(2)
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=1, num_attention_heads=2,
            image_size=8, patch_size=4,
        )
    )  # fmt: skip


def depth2img() -> Any:
    components = {"unet": unet(in_channels=5), "depth_estimator": None, "feature_extractor": None}
    return build("StableDiffusionDepth2ImgPipeline", **components)


def image_variation() -> Any:
    return pipeline(
        "StableDiffusionImageVariationPipeline", vae=autoencoder_kl(), image_encoder=vision(), unet=unet(),
        scheduler=scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def upscale() -> Any:
    return build(
        "StableDiffusionUpscalePipeline",
        scheduler("DDIM", prediction_type="v_prediction"),
        unet=unet(in_channels=7, num_class_embeds=1000),
        vae=autoencoder_kl(scaling_factor=0.08333),
        low_res_scheduler=diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02),
    )


def latent_upscale() -> Any:
    # `timestep_cond` is 128 numbers for the level of the noise and the pooled text.
    network = unet(
        in_channels=8, out_channels=5, act_fn="gelu", norm_num_groups=None, time_cond_proj_dim=144, conv_in_kernel=1,
        conv_out_kernel=1, down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        mid_block_type=None, up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        only_cross_attention=False, timestep_post_act="gelu", resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier", block_out_channels=(32, 64, 64), attention_head_dim=16,
    )  # fmt: skip
    sampler = scheduler("EulerDiscrete", prediction_type="sample")
    return build("StableDiffusionLatentUpscalePipeline", sampler, unet=network)


def latent_upscale_call() -> dict[str, Any]:
    pooled = {"pooled_prompt_embeds": noise(1, 16), "negative_pooled_prompt_embeds": noise(1, 16, seed=1)}
    return text() | pooled | {"image": noise(1, 4, 8, 12)}


def unclip(name: str, **components: Any) -> Any:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    return build(
        name,
        unet=unet(class_embed_type="projection", projection_class_embeddings_input_dim=32),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=16),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        **components,
    )


def stable_unclip() -> Any:
    torch.manual_seed(2)
    text_encoder, tokenizer = clip_text()
    config = CLIPTextConfig(**text_encoder.config.to_dict())
    return unclip(
        "StableUnCLIPPipeline",
        sampler=scheduler("DDIM", prediction_type="v_prediction"),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        prior_tokenizer=tokenizer,
        prior_text_encoder=CLIPTextModelWithProjection(config),
        prior=diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=8, embedding_dim=16, num_embeddings=16, num_layers=1
        ),
        prior_scheduler=diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0),
    )


def stable_unclip_img2img() -> Any:
    sampler = scheduler(prediction_type="v_prediction")
    components = {"feature_extractor": None, "image_encoder": vision()}
    return unclip("StableUnCLIPImg2ImgPipeline", sampler=sampler, **components)


def ldm_text_to_image() -> Any:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    torch.manual_seed(2)
    _, tokenizer = clip_text()
    bert = LDMBertConfig(
        vocab_size=len(tokenizer), encoder_layers=1, encoder_ffn_dim=16, encoder_attention_heads=2, head_dim=8,
        d_model=16, pad_token_id=53,
    )  # fmt: skip
    return pipeline(
        "LDMTextToImagePipeline", vqvae=autoencoder_kl(), bert=LDMBertModel(bert), tokenizer=tokenizer, unet=unet(),
        scheduler=scheduler("DDIM", steps_offset=0),
    )  # fmt: skip


def ldm_super_resolution() -> Any:
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        in_channels=6, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, sample_size=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    vqvae = diffusers.VQModel(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=3,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, num_vq_embeddings=32,
    )  # fmt: skip
    sampler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0155, clip_sample=False, set_alpha_to_one=False
    )
    return pipeline("LDMSuperResolutionPipeline", vqvae=vqvae, unet=network, scheduler=sampler)


NETWORKS = ("unet",)

CASES = [
    Case(
        "StableDiffusionPipeline",
        lambda: checked("StableDiffusionPipeline"),
        lambda: text() | SIZE,
        NETWORKS,
    ),
    Case(
        "StableDiffusionImg2ImgPipeline",
        lambda: checked("StableDiffusionImg2ImgPipeline", scheduler("DPMSolverMultistep", use_karras_sigmas=True)),
        img2img,
        NETWORKS,
        "image",
    ),
    # The published checkpoints of this class see the mask and the masked image.
    Case(
        "StableDiffusionInpaintPipeline",
        lambda: checked("StableDiffusionInpaintPipeline", unet=unet(in_channels=9)),
        inpaint,
        NETWORKS,
        "inpaint",
    ),
    Case(
        "StableDiffusionDepth2ImgPipeline",
        depth2img,
        lambda: img2img() | {"depth_map": noise(1, HEIGHT, WIDTH)},
        NETWORKS,
        "image",
    ),
    Case(
        "StableDiffusionImageVariationPipeline",
        image_variation,
        lambda: SIZE | {"image": image(8, 8)},
        NETWORKS,
        "edit",
    ),
    Case(
        "StableDiffusionInstructPix2PixPipeline",
        lambda: checked(
            "StableDiffusionInstructPix2PixPipeline", scheduler("EulerAncestralDiscrete"), unet=unet(in_channels=8)
        ),
        lambda: text() | {"image": image(HEIGHT, WIDTH)},
        NETWORKS,
        "edit",
    ),
    Case(
        "StableDiffusionUpscalePipeline",
        upscale,
        lambda: text() | {"image": image(8, 16)},
        NETWORKS,
        "upscale",
    ),
    Case(
        "StableDiffusionLatentUpscalePipeline",
        latent_upscale,
        latent_upscale_call,
        NETWORKS,
        "upscale",
    ),
    Case(
        "StableUnCLIPPipeline",
        stable_unclip,
        lambda: SIZE | {"prompt": "a cat", "prior_num_inference_steps": 2},
        NETWORKS,
    ),
    Case(
        "StableUnCLIPImg2ImgPipeline",
        stable_unclip_img2img,
        lambda: text() | SIZE | {"image": image(8, 8)},
        NETWORKS,
        "edit",
    ),
    Case(
        "LDMTextToImagePipeline",
        ldm_text_to_image,
        lambda: {"prompt": "a cat", "height": 64, "width": 96, "guidance_scale": 2.0},
        NETWORKS,
    ),
    Case(
        "LDMSuperResolutionPipeline",
        ldm_super_resolution,
        lambda: {"image": 2 * image(8, 16) - 1},
        NETWORKS,
        "upscale",
    ),
]
