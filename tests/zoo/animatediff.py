"""AnimateDiff: Stable Diffusion with layers that join the frames of a video."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from zoo import Case, autoencoder_kl, image, noise, pipeline
from zoo.stable_diffusion import BETAS, SIZE, scheduler, text, unet
from zoo.stable_diffusion_control import controlnet, start

FRAMES = 3
NETWORKS = ("unet",)


def linear(name: str = "DDIM", **config: Any) -> Any:
    """Return a scheduler with the noise levels of the motion modules."""
    if name == "DDIM":
        config |= {"clip_sample": False, "steps_offset": 1}
    return getattr(diffusers, f"{name}Scheduler")(**(BETAS | {"beta_schedule": "linear"}), **config)


def motion() -> Any:
    torch.manual_seed(3)
    return diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4,
        motion_max_seq_length=8,
    )  # fmt: skip


def build(name: str, sampler: Any = None, **components: Any) -> Any:
    base = {
        "unet": components.pop("unet", None) or unet(),
        "vae": autoencoder_kl(),
        "scheduler": sampler or linear(),
        "text_encoder": None,
        "tokenizer": None,
        "motion_adapter": motion(),
    }
    return pipeline(name, **(base | components))


def sdxl() -> Any:
    network = unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=40,
        use_linear_projection=True, transformer_layers_per_block=(1, 1),
    )  # fmt: skip
    sampler = linear("EulerDiscrete", timestep_spacing="leading")
    return build(
        "AnimateDiffSDXLPipeline", sampler, unet=network, text_encoder_2=None, tokenizer_2=None,
        force_zeros_for_empty_prompt=True,
    )  # fmt: skip


def sparse() -> Any:
    """Return the pipeline of scribbles: that of images draws their latents from torch's own generator."""
    torch.manual_seed(2)
    network = diffusers.SparseControlNetModel(
        block_out_channels=(8, 16), layers_per_block=1, in_channels=4, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), norm_num_groups=4,
        conditioning_embedding_out_channels=(8, 8), motion_num_attention_heads=2, motion_max_seq_length=8,
        conditioning_channels=3, use_simplified_condition_embedding=False,
    )  # fmt: skip
    condition = network.controlnet_cond_embedding.conv_out
    start(condition, *network.controlnet_down_blocks, network.controlnet_mid_block)
    sampler = linear("DPMSolverMultistep", algorithm_type="dpmsolver++", use_karras_sigmas=True)
    return build("AnimateDiffSparseControlNetPipeline", sampler, controlnet=network)


def video_text() -> dict[str, Any]:
    return text() | SIZE | {"num_frames": FRAMES}


def frames(seed: int) -> list[Any]:
    return [image(SIZE["height"], SIZE["width"], seed=seed + i) for i in range(FRAMES)]


def video() -> dict[str, Any]:
    return text() | SIZE | {"video": [frame[0] for frame in frames(0)], "strength": 0.6}


def conditions() -> dict[str, Any]:
    return {"conditioning_frames": [frame[0] for frame in frames(9)]}


def sdxl_call() -> dict[str, Any]:
    pooled = {"pooled_prompt_embeds": noise(1, 16), "negative_pooled_prompt_embeds": noise(1, 16, seed=1)}
    return video_text() | pooled


CASES = [
    Case(
        "AnimateDiffPipeline",
        lambda: build("AnimateDiffPipeline"),
        video_text,
        NETWORKS,
        "video",
    ),
    Case(
        "AnimateDiffControlNetPipeline",
        lambda: build("AnimateDiffControlNetPipeline", controlnet=controlnet()),
        lambda: video_text() | conditions(),
        NETWORKS,
        "video",
    ),
    Case("AnimateDiffSDXLPipeline", sdxl, sdxl_call, NETWORKS, "video"),
    Case(
        "AnimateDiffSparseControlNetPipeline",
        sparse,
        lambda: video_text() | {"conditioning_frames": frames(9)[:2], "controlnet_frame_indices": [0, 2]},
        NETWORKS,
        "video",
    ),
    Case(
        "AnimateDiffVideoToVideoPipeline",
        lambda: build("AnimateDiffVideoToVideoPipeline"),
        video,
        NETWORKS,
        "image",
    ),
    Case(
        "AnimateDiffVideoToVideoControlNetPipeline",
        lambda: build("AnimateDiffVideoToVideoControlNetPipeline", linear("EulerDiscrete"), controlnet=controlnet()),
        lambda: video() | conditions(),
        NETWORKS,
        "image",
    ),
    Case(
        "AnimateDiffPAGPipeline",
        lambda: build("AnimateDiffPAGPipeline", scheduler("DDIM")),
        video_text,
        NETWORKS,
        "video",
    ),
]
