"""AnyFlow, whose network predicts mean velocities between two times; FAR makes the frames chunk by chunk."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from . import Case, pipeline
from .wan import autoencoder, embeds, transformer


def build(name: str, network: str, **config: Any) -> Any:
    torch.manual_seed(0)
    components = {"tokenizer": None, "text_encoder": None, "vae": autoencoder()}
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
    return pipeline(name, scheduler=scheduler, transformer=transformer(network, **config), **components)


def whole() -> Any:
    return build("AnyFlowPipeline", "AnyFlowTransformer3DModel")


def chunks() -> Any:
    config = {"compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3}
    return build("AnyFlowFARPipeline", "AnyFlowFARTransformer3DModel", **config)


def call(**more: Any) -> dict[str, Any]:
    return {"height": 32, "width": 64, "num_frames": 5, "prompt_embeds": embeds()["prompt_embeds"]} | more


def guided_call() -> dict[str, Any]:
    return call(guidance_scale=3.0, **embeds())


def chunks_call() -> dict[str, Any]:
    return call(num_frames=9, chunk_partition=[1, 2])


CASES = [
    Case("AnyFlowPipeline", whole, call),
    Case("AnyFlowPipeline", whole, guided_call, variant="guided"),
    Case("AnyFlowFARPipeline", chunks, chunks_call),
]
