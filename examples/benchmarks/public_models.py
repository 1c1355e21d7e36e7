"""FLUX.1, SD3.5 and Wan 2.1 with their published configurations and random weights, and toys of the same classes.

What a configuration leaves out is the default of diffusers' class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

Part = tuple[str, dict[str, Any]]  # a class of diffusers and its configuration
Reward = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Model:
    """A public model as published, and a call of its pipeline.

    Args:
        embeddings: By argument of the call, the shape of one row of what the text encoders would put out.
        particles: K.
    """

    name: str
    pipeline: str
    transformer: Part
    vae: Part
    scheduler: Part
    embeddings: dict[str, tuple[int, ...]]
    call: dict[str, Any]
    particles: int = 8


def autoencoder(stages: int, scaling: float, shift: float, **config: Any) -> Part:
    """Return an AutoencoderKL of 16 channels without quantising convolutions."""
    return "AutoencoderKL", config | {
        "down_block_types": ("DownEncoderBlock2D",) * stages, "up_block_types": ("UpDecoderBlock2D",) * stages,
        "latent_channels": 16, "scaling_factor": scaling, "shift_factor": shift,
        "use_quant_conv": False, "use_post_quant_conv": False,
    }  # fmt: skip


def sd3(**config: Any) -> Part:
    return "SD3Transformer2DModel", {"qk_norm": "rms_norm"} | config


FULL: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024}
UNIPC: Part = (
    "UniPCMultistepScheduler",
    {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
)
FLOW_MATCH = "FlowMatchEulerDiscreteScheduler"
FLUX = Model(
    "FLUX.1-dev", "FluxPipeline",
    ("FluxTransformer2DModel", {"guidance_embeds": True}),
    autoencoder(4, 0.3611, 0.1159, **FULL),
    (FLOW_MATCH, {"shift": 3.0, "use_dynamic_shifting": True}),
    {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)},
    {"height": 1024, "width": 1024, "guidance_scale": 3.5},
)  # fmt: skip
SD3_LARGE = Model(
    "SD3.5 large", "StableDiffusion3Pipeline",
    sd3(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192),
    autoencoder(4, 1.5305, 0.0609, **FULL),
    (FLOW_MATCH, {"shift": 3.0}),
    {"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,),
     "negative_prompt_embeds": (333, 4096), "negative_pooled_prompt_embeds": (2048,)},
    {"height": 1024, "width": 1024, "guidance_scale": 4.5},
)  # fmt: skip
SD3_MEDIUM = replace(
    SD3_LARGE, name="SD3.5 medium",
    transformer=sd3(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
                    dual_attention_layers=tuple(range(13))),
)  # fmt: skip
WAN_LARGE = Model(
    "Wan 2.1, 14B", "WanPipeline", ("WanTransformer3DModel", {}), ("AutoencoderKLWan", {}), UNIPC,
    {"prompt_embeds": (512, 4096), "negative_prompt_embeds": (512, 4096)},
    {"height": 480, "width": 832, "num_frames": 33, "guidance_scale": 5.0}, 4,
)  # fmt: skip
WAN = replace(
    WAN_LARGE, name="Wan 2.1, 1.3B",
    transformer=("WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
)  # fmt: skip
MODELS = {"flux": FLUX, "sd35-medium": SD3_MEDIUM, "wan": WAN, "sd35-large": SD3_LARGE, "wan-14b": WAN_LARGE}

SMALL: dict[str, Any] = {"num_attention_heads": 2, "num_layers": 2}
SMALL_TEXT: dict[str, Any] = {"joint_attention_dim": 16, "pooled_projection_dim": 16}
SMALL_KL = autoencoder(2, 1.5, 0.1, block_out_channels=(8, 8), norm_num_groups=4)
TOYS: dict[str, tuple[dict[str, Any], Part, dict[str, int]]] = {  # of each pipeline: transformer, autoencoder, sizes
    "FluxPipeline": (
        {"num_single_layers": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 8)} | SMALL | SMALL_TEXT,
        SMALL_KL, {"height": 16, "width": 24}),
    "StableDiffusion3Pipeline": (
        {"attention_head_dim": 8, "caption_projection_dim": 16, "sample_size": 8, "pos_embed_max_size": 16,
         "dual_attention_layers": (0,)} | SMALL | SMALL_TEXT,
        SMALL_KL, {"height": 16, "width": 24}),
    "WanPipeline": (
        {"attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 24, "rope_max_seq_len": 32} | SMALL,
        ("AutoencoderKLWan", {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}),
        {"height": 16, "width": 32, "num_frames": 5}),
}  # fmt: skip
VIT_L: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "patch_size": 14, "image_size": 224, "projection_dim": 768,
}  # fmt: skip
SMALL_VIT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "patch_size": 14, "image_size": 28, "projection_dim": 8,
}  # fmt: skip


def toy(model: Model) -> Model:
    """Return a model of the same classes, of two layers and tiny width."""
    (name, config), (small, vae, sizes) = model.transformer, TOYS[model.pipeline]
    embeddings = {one: (*(8 for _ in shape[1:]), 16) for one, shape in model.embeddings.items()}
    call = model.call | sizes
    return replace(model, transformer=(name, config | small), vae=vae, embeddings=embeddings, call=call, particles=2)


def made(part: Part, device: str) -> Any:
    """Return a network with random weights on a device, bfloat16 but for what diffusers keeps in float32."""
    name, config = part
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            network: Any = getattr(diffusers, name)(**config)
    finally:
        torch.set_default_dtype(before)
    for path, weight in network.named_parameters():
        if any(kept in path for kept in network._keep_in_fp32_modules or ()):
            weight.data = weight.data.float()
    return network.eval()


def parameters(network: Any) -> int:
    return sum(weight.numel() for weight in network.parameters())


def clip(sizes: dict[str, Any], device: str) -> Reward:
    """Return 100 · the cosine of a fixed vector and what an image tower of CLIP makes of frames, their mean."""
    with torch.device(device):
        tower: Any = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**sizes)).eval()

    def score(images: Tensor, prompts: Any) -> Tensor:
        frames = images.reshape(-1, *images.shape[-3:])
        size = (sizes["image_size"], sizes["image_size"])
        pixels = torch.nn.functional.interpolate(frames, size, mode="bicubic", antialias=True)
        features = tower(pixel_values=4 * pixels - 2).image_embeds
        return 100 * torch.cosine_similarity(features, torch.ones_like(features)).view(len(images), -1).mean(1)

    return score
