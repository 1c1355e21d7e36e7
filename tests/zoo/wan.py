"""Wan and the pipelines of its parts: Lucy Edit, ChronoEdit. Latents are (batch, channel, frame, height, width)."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from . import Case, image, mask, noise, pipeline

HEIGHT, WIDTH, FRAMES = 16, 32, 5
TEXT = 16


def autoencoder(**config: Any) -> Any:
    """Return a Wan autoencoder that shortens time four times and each side eight times."""
    torch.manual_seed(1)
    sizes = {
        "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
        "latents_mean": [-0.7, -0.9, 0.1, 0.9], "latents_std": [2.8, 1.4, 2.3, 1.2],
    }  # fmt: skip
    return diffusers.AutoencoderKLWan(**(sizes | config))


def unipc(flow_shift: float) -> Any:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
    )


def transformer(name: str = "WanTransformer3DModel", **config: Any) -> Any:
    sizes = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
        "out_channels": 4, "text_dim": TEXT, "freq_dim": 16, "ffn_dim": 24, "num_layers": 1, "rope_max_seq_len": 32,
    }  # fmt: skip
    return getattr(diffusers, name)(**(sizes | config))


def image_encoder() -> dict[str, Any]:
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2,
        projection_dim=8,
    )  # fmt: skip
    return {
        "image_encoder": CLIPVisionModel(config),
        "image_processor": CLIPImageProcessor(crop_size=4, size={"shortest_edge": 4}),
    }


def picture(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Image.Image:
    return Image.fromarray((255 * image(height, width, seed)[0].permute(1, 2, 0)).byte().numpy())


def video(frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> list[Image.Image]:
    return [picture(height, width, seed) for seed in range(frames)]


def build(name: str, scheduler: Any = None, **components: Any) -> Any:
    texts = {"tokenizer": None, "text_encoder": None}
    return pipeline(name, vae=autoencoder(), scheduler=scheduler or unipc(3.0), **texts, **components)


def text_to_video() -> Any:
    torch.manual_seed(0)
    return build("WanPipeline", transformer=transformer())


def two_experts() -> Any:
    torch.manual_seed(0)
    experts = {name: transformer() for name in ("transformer", "transformer_2")}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=12.0)
    return build("WanPipeline", scheduler, **experts, boundary_ratio=0.875)


def time_per_token() -> Any:
    torch.manual_seed(0)
    return build("WanPipeline", unipc(5.0), transformer=transformer(), expand_timesteps=True)


def image_to_video() -> Any:
    torch.manual_seed(0)
    network = transformer(in_channels=12, image_dim=8, added_kv_proj_dim=24)
    return build("WanImageToVideoPipeline", transformer=network, **image_encoder())


def image_to_video_two_experts() -> Any:
    torch.manual_seed(0)
    experts = {name: transformer(in_channels=12) for name in ("transformer", "transformer_2")}
    return build("WanImageToVideoPipeline", unipc(5.0), **experts, boundary_ratio=0.9)


def image_to_video_time_per_token() -> Any:
    torch.manual_seed(0)
    return build("WanImageToVideoPipeline", unipc(5.0), transformer=transformer(), expand_timesteps=True)


def video_to_video() -> Any:
    torch.manual_seed(0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return build("WanVideoToVideoPipeline", scheduler, transformer=transformer())


def vace() -> Any:
    torch.manual_seed(0)
    network = transformer("WanVACETransformer3DModel", num_layers=2, vace_layers=[0, 1], vace_in_channels=2 * 4 + 64)
    return build("WanVACEPipeline", transformer=network)


def animate() -> Any:
    torch.manual_seed(0)
    network = transformer(
        "WanAnimateTransformer3DModel", in_channels=12, latent_channels=4, image_dim=8, added_kv_proj_dim=24,
        motion_encoder_channel_sizes={"4": 8, "8": 8}, motion_encoder_size=8, motion_style_dim=8, motion_dim=4,
        motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2, inject_face_latents_blocks=1,
    )  # fmt: skip
    return build("WanAnimatePipeline", unipc(5.0), transformer=network, **image_encoder())


def lucy_edit() -> Any:
    torch.manual_seed(0)
    return build("LucyEditPipeline", unipc(5.0), transformer=transformer(in_channels=8), expand_timesteps=True)


def chrono_edit(scheduler: Any = None) -> Any:
    torch.manual_seed(0)
    network = transformer("ChronoEditTransformer3DModel", in_channels=12, image_dim=8, added_kv_proj_dim=24)
    scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    return build("ChronoEditPipeline", scheduler, transformer=network, **image_encoder())


def chrono_reasoning() -> Any:
    return chrono_edit(unipc(2.0))


def embeds() -> dict[str, Any]:
    return {"prompt_embeds": noise(1, 4, TEXT), "negative_prompt_embeds": noise(1, 4, TEXT, seed=1)}


def size(**call: Any) -> dict[str, Any]:
    return {"height": HEIGHT, "width": WIDTH, **embeds(), **call}


def text_call() -> dict[str, Any]:
    return size(num_frames=FRAMES)


def two_experts_call() -> dict[str, Any]:
    return size(num_frames=FRAMES, guidance_scale=4.0, guidance_scale_2=3.0)


def image_call() -> dict[str, Any]:
    return size(num_frames=FRAMES, image=picture())


def video_call() -> dict[str, Any]:
    return size(video=video(), strength=0.6)


def vace_call() -> dict[str, Any]:
    painted = Image.fromarray((255 * mask(HEIGHT, WIDTH)[0, 0]).byte().numpy())
    return size(video=video(), mask=[painted] * FRAMES, reference_images=[picture(seed=9)], num_frames=FRAMES)


def animate_call() -> dict[str, Any]:
    # two segments, so that the loop runs twice
    faces, poses = video(9, 8, 8), video(9)
    return size(image=picture(), pose_video=poses, face_video=faces, segment_frame_length=FRAMES)


def lucy_call() -> dict[str, Any]:
    return size(num_frames=FRAMES, video=video())


def chrono_call() -> dict[str, Any]:
    return size(image=picture())


def chrono_reasoning_call() -> dict[str, Any]:
    # the frames between the first and the last leave the loop after two steps
    return size(image=picture(), num_frames=9, enable_temporal_reasoning=True, num_temporal_reasoning_steps=2)


EXPERTS = ("transformer", "transformer_2")
CASES = [
    Case("WanPipeline", text_to_video, text_call),
    Case("WanPipeline", two_experts, two_experts_call, EXPERTS, variant="two experts"),
    Case("WanPipeline", time_per_token, text_call, variant="a time per token"),
    Case("WanImageToVideoPipeline", image_to_video, image_call, task="video"),
    Case("WanImageToVideoPipeline", image_to_video_two_experts, image_call, EXPERTS, "video", "two experts"),
    Case(
        "WanImageToVideoPipeline", image_to_video_time_per_token, image_call, task="video", variant="a time per token"
    ),
    Case("WanVideoToVideoPipeline", video_to_video, video_call, task="image"),
    Case("WanVACEPipeline", vace, vace_call, task="control"),
    Case("WanAnimatePipeline", animate, animate_call, task="video"),
    Case("LucyEditPipeline", lucy_edit, lucy_call, task="edit"),
    Case("ChronoEditPipeline", chrono_edit, chrono_call, task="edit"),
    Case("ChronoEditPipeline", chrono_reasoning, chrono_reasoning_call, task="edit", variant="temporal reasoning"),
]
