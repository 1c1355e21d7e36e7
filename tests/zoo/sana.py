"""Sana's image and video pipelines: linear attention on the latents of a deep compression or a causal autoencoder."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from . import Case, image, noise, pipeline
from .qwen import awake

SIZE = {"height": 32, "width": 64, "use_resolution_binning": False}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def transformer(cls: Any = None, **config: Any) -> Any:
    return (cls or diffusers.SanaTransformer2DModel)(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=32, **config,
    )  # fmt: skip


def video_transformer() -> Any:
    return diffusers.SanaVideoTransformer3DModel(
        patch_size=(1, 2, 2), in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
        attention_head_dim=12, num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
        caption_channels=8, sample_size=30, rope_max_seq_len=32,
    )  # fmt: skip


def vae() -> Any:
    """Return an autoencoder that divides each side by four."""
    blocks = {"block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8, 8)}
    blocks |= {"layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), (5,))}
    return diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, scaling_factor=0.41407,
        **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in blocks.items()},
    )  # fmt: skip


def video_vae() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[-0.8, 0.1, 0.5, -0.2], latents_std=[2.8, 1.5, 1.2, 2.0],
    )  # fmt: skip


def sana(name: str, scheduler: Any, extra: dict[str, Any] | None = None, **config: Any) -> Any:
    torch.manual_seed(0)
    components = {"transformer": transformer(**config), "vae": vae(), "scheduler": scheduler}
    return pipeline(name, tokenizer=None, text_encoder=None, **components, **(extra or {}))


def sana_video(name: str, scheduler: Any) -> Any:
    torch.manual_seed(0)
    components = {"transformer": video_transformer(), "vae": video_vae(), "scheduler": scheduler}
    return pipeline(name, tokenizer=None, text_encoder=None, **components)


def text_to_image() -> Any:
    return sana("SanaPipeline", diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0))


def control() -> Any:
    torch.manual_seed(1)
    controlnet = awake(transformer(diffusers.SanaControlNetModel))
    scheduler = diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0)
    return sana("SanaControlNetPipeline", scheduler, {"controlnet": controlnet.eval()})


def perturbed() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return sana("SanaPAGPipeline", scheduler, {"pag_applied_layers": ["transformer_blocks.1"]})


def sprint(name: str) -> Any:
    return sana(name, diffusers.SCMScheduler(), qk_norm="rms_norm_across_heads", guidance_embeds=True)


def text_to_video() -> Any:
    scheduler = diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=8.0)
    return sana_video("SanaVideoPipeline", scheduler)


def image_to_video() -> Any:
    return sana_video("SanaImageToVideoPipeline", diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0))


def prompt() -> dict[str, Any]:
    return {"prompt_embeds": noise(1, 5, 8), "prompt_attention_mask": torch.ones(1, 5, dtype=torch.long)}


def guided(**call: Any) -> dict[str, Any]:
    negative = {f"negative_{key}": value for key, value in prompt().items()}
    negative |= {"negative_prompt": None, "negative_prompt_embeds": noise(1, 5, 8, seed=1)}
    return SIZE | prompt() | negative | call


def distilled(**call: Any) -> dict[str, Any]:
    # The intermediate time is for exactly two steps.
    return SIZE | prompt() | {"intermediate_timesteps": None} | call


CASES = [
    Case("SanaPipeline", text_to_image, guided),
    Case(
        "SanaControlNetPipeline",
        control,
        lambda: guided(control_image=image(32, 64)),
        networks=("transformer", "controlnet"),
        task="control",
    ),
    Case("SanaPAGPipeline", perturbed, guided),
    Case("SanaSprintPipeline", lambda: sprint("SanaSprintPipeline"), distilled),
    Case(
        "SanaSprintImg2ImgPipeline",
        lambda: sprint("SanaSprintImg2ImgPipeline"),
        lambda: distilled(image=image(32, 64), strength=0.6),
        task="image",
    ),
    Case("SanaVideoPipeline", text_to_video, lambda: guided(frames=5), task="video"),
    Case(
        "SanaImageToVideoPipeline",
        image_to_video,
        lambda: guided(image=image(32, 64), frames=9),
        task="video",
    ),
]
