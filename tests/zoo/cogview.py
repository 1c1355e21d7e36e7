"""CogView's and GLM-Image's pipelines: time and noise level run on separate schedules from CogView4 on."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from . import Case, autoencoder_kl, image, noise, pipeline

SIZE = {"height": 16, "width": 32}
FLOW = {"use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"}


def network(name: str, **config: Any) -> Any:
    torch.manual_seed(0)
    common = {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2}
    common |= {"attention_head_dim": 8, "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4}
    return getattr(diffusers, name)(**(common | config))


def cogview(name: str, transformer: Any, scheduler: Any) -> Any:
    components = {"transformer": transformer, "vae": autoencoder_kl(), "scheduler": scheduler}
    return pipeline(name, tokenizer=None, text_encoder=None, **components)


def third() -> Any:
    transformer = network("CogView3PlusTransformer2DModel", pos_embed_max_size=8, sample_size=8)
    scheduler = diffusers.CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        clip_sample=False, rescale_betas_zero_snr=True, snr_shift_scale=4.0, timestep_spacing="trailing",
    )  # fmt: skip
    return cogview("CogView3PlusPipeline", transformer, scheduler)


def fourth(name: str, **config: Any) -> Any:
    transformer = network("CogView4Transformer2DModel", sample_size=8, **config)
    return cogview(name, transformer, diffusers.FlowMatchEulerDiscreteScheduler(**FLOW))


def glm() -> Any:
    transformer = network("GlmImageTransformer2DModel", prior_vq_quantizer_codebook_size=16)
    vae = autoencoder_kl(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.2, 1.0])
    return pipeline(
        "GlmImagePipeline", tokenizer=None, processor=None, text_encoder=None, vision_language_encoder=None, vae=vae,
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW),
    )  # fmt: skip


def prompt() -> dict[str, Any]:
    return {"prompt_embeds": noise(1, 5, 16), "negative_prompt_embeds": noise(1, 5, 16, seed=1)}


def control_call() -> dict[str, Any]:
    torch.manual_seed(0)  # the control image is encoded with the global generator
    return SIZE | prompt() | {"control_image": image(16, 32)}


def glm_call() -> dict[str, Any]:
    # One token of the autoregressive model per patch, the patches here being of 4 × 4 pixels.
    return SIZE | prompt() | {"prior_token_ids": torch.arange(4 * 8)[None] % 16}


CASES = [
    Case("CogView3PlusPipeline", third, lambda: SIZE | prompt()),
    Case("CogView4Pipeline", lambda: fourth("CogView4Pipeline"), lambda: SIZE | prompt()),
    Case(
        "CogView4ControlPipeline",
        lambda: fourth("CogView4ControlPipeline", in_channels=8),
        control_call,
        task="control",
    ),
    Case("GlmImagePipeline", glm, glm_call),
]
