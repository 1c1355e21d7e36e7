"""Stable Diffusion 1 with a ControlNet, a T2I-Adapter, or perturbed-attention guidance."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from zoo import Case, image
from zoo.stable_diffusion import HEIGHT, SIZE, WIDTH, checked, img2img, inpaint, scheduler, text, unet

NETWORKS = ("unet",)


def start(*convolutions: Any) -> None:
    """Give weights to the convolutions that start at zero and would leave out the control."""
    for convolution in convolutions:
        torch.nn.init.normal_(convolution.weight, std=0.1)


def controlnet() -> Any:
    torch.manual_seed(2)
    network = diffusers.ControlNetModel(
        block_out_channels=(8, 16), layers_per_block=1, in_channels=4, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=4,
        conditioning_embedding_out_channels=(8, 8),
    )  # fmt: skip
    condition = network.controlnet_cond_embedding.conv_out
    start(condition, *network.controlnet_down_blocks, network.controlnet_mid_block)
    return network


def control(name: str, sampler: Any = None, **components: Any) -> Any:
    return checked(name, sampler, controlnet=controlnet(), **components)


def adapter() -> Any:
    torch.manual_seed(2)
    network = diffusers.T2IAdapter(in_channels=3, channels=(8, 16), num_res_blocks=1, downscale_factor=2)
    sampler = scheduler("EulerDiscrete")
    return checked("StableDiffusionAdapterPipeline", sampler, adapter=network)


def control_text() -> dict[str, Any]:
    return text() | {"image": image(HEIGHT, WIDTH, seed=1)}


def control_image() -> dict[str, Any]:
    return {"control_image": image(HEIGHT, WIDTH, seed=1)}


CASES = [
    Case(
        "StableDiffusionControlNetPipeline",
        lambda: control("StableDiffusionControlNetPipeline", scheduler("UniPCMultistep")),
        control_text,
        NETWORKS,
        "control",
    ),
    Case(
        "StableDiffusionControlNetImg2ImgPipeline",
        lambda: control("StableDiffusionControlNetImg2ImgPipeline", scheduler("DDIM")),
        lambda: img2img() | control_image(),
        NETWORKS,
        "image",
    ),
    # With a UNet that does not see the mask, the rest of the image is pasted after each step.
    Case(
        "StableDiffusionControlNetInpaintPipeline",
        lambda: control("StableDiffusionControlNetInpaintPipeline", scheduler("DDIM")),
        lambda: inpaint() | control_image(),
        NETWORKS,
        "inpaint",
    ),
    Case(
        "StableDiffusionAdapterPipeline",
        adapter,
        control_text,
        NETWORKS,
        "control",
    ),
    Case(
        "StableDiffusionPAGPipeline",
        lambda: checked("StableDiffusionPAGPipeline", scheduler("DDIM")),
        lambda: text() | SIZE,
        NETWORKS,
    ),
    Case(
        "StableDiffusionPAGImg2ImgPipeline",
        lambda: checked("StableDiffusionPAGImg2ImgPipeline", scheduler("EulerDiscrete")),
        img2img,
        NETWORKS,
        "image",
    ),
    Case(
        "StableDiffusionPAGInpaintPipeline",
        lambda: checked("StableDiffusionPAGInpaintPipeline", scheduler("DDIM"), unet=unet(in_channels=9)),
        inpaint,
        NETWORKS,
        "inpaint",
    ),
    Case(
        "StableDiffusionControlNetPAGPipeline",
        lambda: control("StableDiffusionControlNetPAGPipeline", scheduler("DPMSolverMultistep")),
        control_text,
        NETWORKS,
        "control",
    ),
    Case(
        "StableDiffusionControlNetPAGInpaintPipeline",
        lambda: control("StableDiffusionControlNetPAGInpaintPipeline"),
        lambda: inpaint() | control_image() | {"strength": 0.6},
        NETWORKS,
        "inpaint",
    ),
]
