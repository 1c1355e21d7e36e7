"""Qwen-Image: generation, control, editing, layers; version 2.1."""

from __future__ import annotations

import string
from functools import partial
from typing import Any

import diffusers
import PIL.Image
import torch
from torch import Tensor

from . import Case, image, mask, noise, pipeline
from .text import Processor, byte_tokenizer, seeing

TRANSFORMER = {
    "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4),
}  # fmt: skip
SIZE = {"height": 16, "width": 24}


def scheduler(**config: Any) -> Any:
    shift = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    return diffusers.FlowMatchEulerDiscreteScheduler(**({"use_dynamic_shifting": True} | shift | config))


class Tiles(torch.nn.Module):
    """A convolution whose outputs are tiles of pixels."""

    def __init__(self, conv: torch.nn.Conv3d, tile: int) -> None:
        super().__init__()
        self.conv, self.tile = type(conv)(conv.in_channels, conv.out_channels * tile**2, 1), tile

    def forward(self, x: Tensor, cache: Tensor | None = None) -> Tensor:
        x = self.conv(x, cache).unflatten(1, (-1, self.tile, self.tile))
        return x.permute(0, 1, 4, 5, 2, 6, 3).flatten(5, 6).flatten(3, 4)


def vae(compression: int = 4) -> Any:
    """Return an image autoencoder that halves the sides once, in tiles of pixels: fast on images of any size."""
    halvings, tile = compression.bit_length() - 1, compression // 2
    model = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=0, temperal_downsample=[False] * halvings,
        latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.2, 0.8, 1.0, 1.1],
    )  # fmt: skip
    conv = model.encoder.conv_in
    model.encoder.conv_in = type(conv)(3, conv.out_channels, (1, tile, tile), stride=(1, tile, tile))
    model.decoder.conv_out = Tiles(model.decoder.conv_out, tile)
    return model


def awake(network: torch.nn.Module) -> Any:
    """Return a network whose weights that start at zero, for the sake of training, are random as well."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def qwen(name: str, compression: int = 4, transformer: dict[str, Any] | None = None, **components: Any) -> Any:
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(**(TRANSFORMER | (transformer or {})))
    parts = {"scheduler": scheduler(), "transformer": model, "vae": vae(compression), "text_encoder": None}
    return pipeline(name, **(parts | {"tokenizer": None} | components))


def control(name: str, extra_condition_channels: int = 0) -> Any:
    torch.manual_seed(1)
    model = diffusers.QwenImageControlNetModel(**TRANSFORMER, extra_condition_channels=extra_condition_channels)
    return qwen(name, controlnet=awake(model))


def edit(name: str, **transformer: Any) -> Any:
    # A million pixels are encoded whatever is asked for.
    return qwen(name, compression=64, transformer=transformer, processor=None)


def layered() -> Any:
    torch.manual_seed(2)
    encoder = seeing("Qwen2_5_VLForConditionalGeneration", 16, len(byte_tokenizer()), 1)
    # A caption ends with any token that is no lower-case letter: with random weights it would be 512 tokens long.
    letters = byte_tokenizer().convert_tokens_to_ids(list(string.ascii_lowercase))
    encoder.generation_config.eos_token_id = sorted(set(range(len(byte_tokenizer()))) - set(letters))
    transformer = {"use_additional_t_cond": True, "use_layer3d_rope": True}
    parts = {"tokenizer": byte_tokenizer(), "processor": Processor(), "scheduler": scheduler(shift_terminal=None)}
    return qwen("QwenImageLayeredPipeline", compression=32, transformer=transformer, text_encoder=encoder, **parts)


def version_2_1() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2, context_in_dim=16,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    # A token is sixteen pixels across, whatever the autoencoder.
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1] * 5, num_res_blocks=1, latents_mean=[0.1] * 4,
        latents_std=[1.2] * 4,
    )  # fmt: skip
    return pipeline(
        "QwenImage21Pipeline", vae=vae, transformer=transformer, scheduler=scheduler(), text_encoder=None,
        processor=Processor(),
    )  # fmt: skip


def picture(height: int = 16, width: int = 64) -> Any:
    return PIL.Image.fromarray((image(height, width)[0].permute(1, 2, 0) * 255).byte().numpy())


def call_control_inpaint() -> dict[str, Any]:
    torch.manual_seed(0)  # The latents of the control image are drawn without the generator.
    return call(control_image=image(16, 24), control_mask=mask(16, 24), **SIZE)


def call(**more: Any) -> dict[str, Any]:
    embeds = {"prompt_embeds": noise(1, 5, 16), "negative_prompt_embeds": noise(1, 3, 16, seed=1)}
    masks = {"prompt_embeds_mask": torch.ones(1, 5).long(), "negative_prompt_embeds_mask": torch.ones(1, 3).long()}
    return embeds | masks | {"true_cfg_scale": 2.0} | more


CASES = [
    Case("QwenImagePipeline", partial(qwen, "QwenImagePipeline"), lambda: call(**SIZE)),
    Case(
        "QwenImageImg2ImgPipeline",
        partial(qwen, "QwenImageImg2ImgPipeline"),
        lambda: call(image=image(16, 24), strength=0.6, **SIZE),
        task="image",
    ),
    Case(
        "QwenImageInpaintPipeline",
        partial(qwen, "QwenImageInpaintPipeline"),
        lambda: call(image=image(16, 24), mask_image=mask(16, 24), strength=0.6, **SIZE),
        task="inpaint",
    ),
    Case(
        "QwenImageControlNetPipeline",
        partial(control, "QwenImageControlNetPipeline"),
        lambda: call(control_image=image(16, 24), controlnet_conditioning_scale=0.5, **SIZE),
        networks=("transformer", "controlnet"),
        task="control",
    ),
    Case(
        "QwenImageControlNetInpaintPipeline",
        partial(control, "QwenImageControlNetInpaintPipeline", extra_condition_channels=4),
        call_control_inpaint,
        networks=("transformer", "controlnet"),
        task="control",
    ),
    Case(
        "QwenImageEditPipeline",
        partial(edit, "QwenImageEditPipeline"),
        lambda: call(image=picture(), height=128, width=256),
        task="edit",
    ),
    Case(
        "QwenImageEditInpaintPipeline",
        partial(edit, "QwenImageEditInpaintPipeline"),
        lambda: call(image=picture(), mask_image=mask(16, 64), strength=0.6),
        task="inpaint",
    ),
    Case(
        "QwenImageEditPlusPipeline",
        partial(edit, "QwenImageEditPlusPipeline", zero_cond_t=True),
        lambda: call(image=[picture()], height=128, width=256),
        task="edit",
    ),
    Case(
        "QwenImageLayeredPipeline",
        layered,
        lambda: call(image=picture(), prompt="a", layers=1, resolution=640),
        task="edit",
    ),
    Case("QwenImage21Pipeline", version_2_1, lambda: call(height=64, width=96)),
]
