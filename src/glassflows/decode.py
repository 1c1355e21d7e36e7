"""Latents → images, as each pipeline family does at the end of its own call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Decode = Callable[[Tensor], Tensor]

_REMEDY = "pass decode=, a function from latents to images (N, 3, H, W) in [0, 1]"


def decoder(pipe: Any, call: Mapping[str, Any]) -> Decode:
    """Return the function that turns latents, as the scheduler sees them, into images (N, 3, H, W), float32 in [0, 1].

    Args:
        pipe: A pipeline with an `AutoencoderKL` over four-dimensional latents (SD, SDXL, SD3, PixArt …) or over latents
            packed as FLUX packs them.
        call: The keyword arguments of the pipeline's call; `height` and `width` are read.

    Raises:
        ValueError: if the pipeline is of no known family.
    """
    vae: Any = getattr(pipe, "vae", None)
    processor: Any = getattr(pipe, "image_processor", None)
    if type(vae).__name__ != "AutoencoderKL" or processor is None:
        raise ValueError(f"decode: do not know how {type(pipe).__name__} turns latents into images: {_REMEDY}")
    unpack = _unpacker(pipe, call)

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        dtype = vae.dtype
        upcast = dtype == torch.float16 and vae.config.force_upcast  # SDXL's own overflows in half precision
        try:
            if upcast:
                vae.to(torch.float32)
            images = vae.decode(_unscale(unpack(latents).to(vae.dtype), vae.config), return_dict=False)[0]
        finally:
            if upcast:
                vae.to(dtype)
        return processor.postprocess(images, output_type="pt").float()

    return decode


def _unpacker(pipe: Any, call: Mapping[str, Any]) -> Decode:
    unpack = getattr(pipe, "_unpack_latents", None)
    if unpack is None:
        return lambda latents: latents
    names = list(inspect.signature(unpack).parameters)
    resizes = "max_area" in inspect.signature(type(pipe).__call__).parameters  # Kontext picks a size of its own
    if resizes or names != ["latents", "height", "width", "vae_scale_factor"]:
        raise ValueError(f"decode: {type(pipe).__name__} packs or sizes its latents in a way of its own: {_REMEDY}")
    default = pipe.default_sample_size * pipe.vae_scale_factor
    height, width = (call.get(name) or default for name in ("height", "width"))
    return lambda latents: unpack(latents, height, width, pipe.vae_scale_factor)


def _unscale(latents: Tensor, config: Any) -> Tensor:
    """Undo the scaling to unit variance."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:  # SDXL fine-tunes that scale each channel
        mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(latents) for v in (mean, std))
        return latents * std / config.scaling_factor + mean
    return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
