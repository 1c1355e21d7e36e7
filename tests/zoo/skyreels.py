"""SkyReels V2. Diffusion forcing gives each latent frame a copy of the scheduler and a time of its own."""

from __future__ import annotations

from typing import Any

import torch

from . import Case, pipeline
from .wan import autoencoder, embeds, image_encoder, picture, transformer, unipc, video

HEIGHT, WIDTH, FRAMES = 16, 32, 5


def build(name: str, flow_shift: float = 8.0, **config: Any) -> Any:
    torch.manual_seed(0)
    encoder = image_encoder() if "image_dim" in config else {}
    network = transformer("SkyReelsV2Transformer3DModel", **config)
    components = {"tokenizer": None, "text_encoder": None, "vae": autoencoder(), "transformer": network, **encoder}
    return pipeline(name, scheduler=unipc(flow_shift), **components)


def text_to_video() -> Any:
    return build("SkyReelsV2Pipeline")


def image_to_video() -> Any:
    return build("SkyReelsV2ImageToVideoPipeline", 5.0, in_channels=12, image_dim=8, added_kv_proj_dim=24)


def forcing() -> Any:
    return build("SkyReelsV2DiffusionForcingPipeline", inject_sample_info=True)


def forcing_from_image() -> Any:
    return build("SkyReelsV2DiffusionForcingImageToVideoPipeline", 5.0)


def forcing_from_video() -> Any:
    return build("SkyReelsV2DiffusionForcingVideoToVideoPipeline")


def call(**more: Any) -> dict[str, Any]:
    return {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, **embeds(), **more}


def image_call() -> dict[str, Any]:
    return call(image=picture())


def forcing_call() -> dict[str, Any]:
    return call(prompt=None)


def asynchronous_call() -> dict[str, Any]:
    return call(prompt=None, num_frames=9, ar_step=1, causal_block_size=1)


def video_call() -> dict[str, Any]:
    return call(video=video(), num_frames=13, base_num_frames=9, overlap_history=5)


CASES = [
    Case("SkyReelsV2Pipeline", text_to_video, call),
    Case("SkyReelsV2ImageToVideoPipeline", image_to_video, image_call, task="video"),
    Case("SkyReelsV2DiffusionForcingPipeline", forcing, forcing_call),
    Case("SkyReelsV2DiffusionForcingPipeline", forcing, asynchronous_call, variant="asynchronous"),
    Case("SkyReelsV2DiffusionForcingImageToVideoPipeline", forcing_from_image, image_call, task="video"),
    Case("SkyReelsV2DiffusionForcingVideoToVideoPipeline", forcing_from_video, video_call, task="video"),
]
