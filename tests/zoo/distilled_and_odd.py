"""Consistency models, Shap-E, Stable Cascade and LEDITS++: what is not sampled as a diffusion from noise to data."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModel

from tiny import SD_SCHEDULER, clip_text
from zoo import Case, autoencoder_kl, image, noise, pipeline
from zoo.unconditional import unet as pixel_unet

WIDTH = 16  # of every embedding
TOKENS = 5


def consistency() -> Any:
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0)
    return pipeline("ConsistencyModelPipeline", unet=pixel_unet(16, num_class_embeds=10), scheduler=scheduler)


def latent_unet(**config: Any) -> Any:
    shape = {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": WIDTH, "attention_head_dim": 4,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**(shape | config))


def latent_consistency(name: str) -> Any:
    torch.manual_seed(0)
    return pipeline(
        name, unet=latent_unet(time_cond_proj_dim=16), vae=autoencoder_kl(), text_encoder=None, tokenizer=None,
        scheduler=diffusers.LCMScheduler(**(SD_SCHEDULER | {"set_alpha_to_one": True, "steps_offset": 0})),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def shap_e(name: str, embedding_proj_norm_type: str | None = None, **encoders: Any) -> Any:
    from diffusers.pipelines.shap_e import ShapERenderer

    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=WIDTH, num_embeddings=32,
        embedding_proj_dim=WIDTH, clip_embed_dim=2 * WIDTH, additional_embeddings=0, time_embed_act_fn="gelu",
        norm_in_type="layer", encoder_hid_proj_type=None, added_emb_type=None,
        embedding_proj_norm_type=embedding_proj_norm_type,
    )  # fmt: skip
    scheduler = diffusers.HeunDiscreteScheduler(
        beta_schedule="exp", num_train_timesteps=1024, prediction_type="sample", use_karras_sigmas=True,
        clip_sample=True, clip_sample_range=1.0,
    )  # fmt: skip
    renderer = ShapERenderer(param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=WIDTH, d_hidden=8)
    return pipeline(name, prior=prior, scheduler=scheduler, shap_e_renderer=renderer, **encoders)


def shap_e_text() -> Any:
    torch.manual_seed(0)
    text, tokenizer = clip_text()
    return shap_e("ShapEPipeline", text_encoder=CLIPTextModelWithProjection(text.config), tokenizer=tokenizer)


def shap_e_image() -> Any:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1, image_size=8, patch_size=4
    )
    return shap_e("ShapEImg2ImgPipeline", "layer", image_encoder=CLIPVisionModel(config), image_processor=None)


def cascade(**config: Any) -> Any:
    blocks = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
    return diffusers.models.StableCascadeUNet(
        block_out_channels=(8, 16), num_attention_heads=(-1, 2), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), block_types_per_layer=(blocks, (*blocks, "SDCascadeAttnBlock")),
        conditioning_dim=WIDTH, timestep_ratio_embedding_dim=8, clip_text_pooled_in_channels=WIDTH, **config,
    )  # fmt: skip


def cascade_decoder() -> Any:
    from diffusers.pipelines.stable_cascade.pipeline_stable_cascade import PaellaVQModel

    torch.manual_seed(0)
    decoder = cascade(
        in_channels=4, out_channels=4, patch_size=2, effnet_in_channels=16, timestep_conditioning_type=("sca",)
    )
    return pipeline(
        "StableCascadeDecoderPipeline", decoder=decoder, tokenizer=None, text_encoder=None, latent_dim_scale=4.0,
        vqgan=PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=8),
        scheduler=diffusers.DDPMWuerstchenScheduler(),
    )  # fmt: skip


def cascade_prior() -> Any:
    torch.manual_seed(0)
    text, tokenizer = clip_text()
    prior = cascade(clip_text_in_channels=WIDTH, clip_image_in_channels=WIDTH)
    return pipeline(
        "StableCascadePriorPipeline", prior=prior, scheduler=diffusers.DDPMWuerstchenScheduler(), tokenizer=tokenizer,
        text_encoder=CLIPTextModelWithProjection(text.config),  # embeddings alone would not do: its type is asked for
    )  # fmt: skip


def inverted(pipe: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    pipe.invert(image=image(32, 64), num_inversion_steps=4, skip=0.25, generator=generator)
    return pipe


def ledits(name: str, scheduler: Any) -> Any:
    torch.manual_seed(0)
    text, tokenizer = clip_text()
    return inverted(
        pipeline(
            name, unet=latent_unet(), vae=autoencoder_kl(sample_size=64), text_encoder=text, tokenizer=tokenizer,
            scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )
    )  # fmt: skip


def ledits_xl(name: str, scheduler: Any) -> Any:
    torch.manual_seed(0)
    text, tokenizer = clip_text()
    unet = latent_unet(
        cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
    )  # fmt: skip
    return inverted(
        pipeline(
            name, unet=unet, vae=autoencoder_kl(sample_size=64), text_encoder=CLIPTextModel(text.config),
            text_encoder_2=CLIPTextModelWithProjection(text.config), tokenizer=tokenizer, tokenizer_2=tokenizer,
            scheduler=scheduler,
        )
    )  # fmt: skip


def dpm_solver() -> Any:
    config = {key: SD_SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
    return diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=2, **config)


def edit() -> dict[str, Any]:
    # The steps are those of the inversion. Masks from attention would ask for a deeper network.
    return {"editing_prompt": ["a horse"], "use_intersect_mask": False, "num_inference_steps": "DROP"}


def sentence(kind: str = "", seed: int = 0) -> dict[str, Any]:
    return {
        f"{kind}prompt_embeds": noise(1, TOKENS, WIDTH, seed=seed),
        f"{kind}prompt_embeds_pooled": noise(1, 1, WIDTH, seed=seed),
    }


UNET, PRIOR = ("unet",), ("prior",)
LATENT = {"output_type": "latent"}  # rendering takes seconds

CASES = [
    Case("ConsistencyModelPipeline", consistency, lambda: {"class_labels": 3}, UNET, "class"),
    Case(
        "LatentConsistencyModelPipeline",
        lambda: latent_consistency("LatentConsistencyModelPipeline"),
        lambda: {"prompt_embeds": noise(1, TOKENS, WIDTH), "height": 16, "width": 24},
        UNET,
    ),
    Case(
        "LatentConsistencyModelImg2ImgPipeline",
        lambda: latent_consistency("LatentConsistencyModelImg2ImgPipeline"),
        lambda: {"prompt_embeds": noise(1, TOKENS, WIDTH), "image": image(16, 24), "strength": 0.6},
        UNET,
        "image",
    ),
    Case("ShapEPipeline", shap_e_text, lambda: LATENT | {"prompt": "a horse"}, PRIOR),
    Case("ShapEImg2ImgPipeline", shap_e_image, lambda: LATENT | {"image": image(8, 8)}, PRIOR),
    Case(
        "StableCascadeDecoderPipeline",
        cascade_decoder,
        lambda: sentence() | {"image_embeddings": noise(1, 16, 2, 3, seed=2)},
        ("decoder",),
    ),
    Case(
        "StableCascadePriorPipeline",
        cascade_prior,
        lambda: sentence() | sentence("negative_", 1) | {"height": 170, "width": 256},
        PRIOR,
    ),
    Case(
        "LEditsPPPipelineStableDiffusion",
        lambda: ledits("LEditsPPPipelineStableDiffusion", dpm_solver()),
        edit,
        UNET,
        "edit",
    ),
    Case(
        "LEditsPPPipelineStableDiffusionXL",
        lambda: ledits_xl("LEditsPPPipelineStableDiffusionXL", diffusers.DDIMScheduler(**SD_SCHEDULER)),
        edit,
        UNET,
        "edit",
    ),
]
