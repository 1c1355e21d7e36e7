"""Inpainting: what a pipeline keeps of the image it is given, and how it puts that back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from .outputs import as_arrays, channels_first
from .patch import Method, replaced
from .refusals import is_one_of

CROPPED = ("image", "mask_image")
"""What a pipeline crops to the mask: one image for all rows, which it takes as PIL's alone."""

_LEAVE_CROPPED = (
    "ChromaInpaintPipeline",
    "FluxControlNetInpaintPipeline",
    "FluxKontextInpaintPipeline",
)
"""They return the part that they cropped to; others paste it into the whole image."""


def crops_to_mask(given: Mapping[str, Any]) -> bool:
    """Return whether a call paints at a part of its image alone, and so puts out PIL images."""
    return given.get("padding_mask_crop") is not None


def pasted(pipe: Any, given: Mapping[str, Any], parts: Tensor, width: int, height: int) -> Tensor:
    """Paste painted parts into the image that they were cropped from, as the pipeline does.

    Args:
        pipe: The pipeline.
        given: The keyword arguments of its call.
        parts: Images (N, 3, height, width) in [0, 1].
        width, height: Sizes that the pipeline runs at.

    Raises:
        ValueError: if a gradient is asked for.
    """
    if is_one_of(pipe, _LEAVE_CROPPED):
        return parts
    if parts.requires_grad:
        raise ValueError(
            "twist: expected images with a gradient in the latents, got those of "
            "padding_mask_crop, which are pasted as bytes: leave one of the two out"
        )
    image, mask = (given[name] for name in CROPPED)
    region = pipe.mask_processor.get_crop_region(
        mask, width, height, pad=given["padding_mask_crop"]
    )
    pictures = VaeImageProcessor.numpy_to_pil(parts.movedim(1, -1).cpu().numpy())
    whole = [pipe.image_processor.apply_overlay(mask, image, one, region) for one in pictures]
    return channels_first(as_arrays(whole)).to(parts.device)


class KeptRegion:
    """What a pipeline blends into its latents after every step: m · latents + (1 − m) · image.

    It noises the image to the level of the step, so its last step leaves the image itself.
    """

    def __init__(self) -> None:
        self._mask: Tensor | None = None
        self._image: Tensor | None = None  # what was noised after a step, to be blended in
        self._has_stepped = False

    @contextmanager
    def watched(self, pipe: Any, scheduler: Any, run: Any) -> Iterator[None]:
        """Note, within a block, the mask that a pipeline prepares and the image that it noises.

        Args:
            pipe: The pipeline.
            scheduler: Its scheduler.
            run: The run whose call it is.
        """
        with ExitStack() as stack:
            if hasattr(pipe, "prepare_mask_latents"):
                masks = replaced(pipe, "prepare_mask_latents", run, self._noting_mask)
                stack.enter_context(masks)
                stack.enter_context(replaced(scheduler, "step", run, self._noting_step))
                for name in ("add_noise", "scale_noise"):
                    stack.enter_context(replaced(scheduler, name, run, self._noting_image))
            yield

    def put_back(self, pipe: Any, z: Tensor) -> Tensor:
        """Return clean latents with what is kept of the image, if it was blended in so far.

        Args:
            pipe: The pipeline.
            z: Those of each particle, as the scheduler sees them.
        """
        if self._mask is None or self._image is None:
            return z
        mask, image = self._mask[: len(z)].to(z), self._image[: len(z)].to(z)
        if image.ndim > z.ndim:  # FLUX's control pipeline packs it once it is noised
            image = pipe._pack_latents(image, *image.shape)
        return (1 - mask) * image + mask * z

    def _noting_mask(self, prepare: Method) -> Method:
        def preparing(*args: Any, **kwargs: Any) -> Any:
            prepared = prepare(*args, **kwargs)
            self._mask = prepared[0] if isinstance(prepared, tuple) else prepared
            return prepared

        return preparing

    def _noting_step(self, step: Method) -> Method:
        def stepping(*args: Any, **kwargs: Any) -> Any:
            self._has_stepped = True
            return step(*args, **kwargs)

        return stepping

    def _noting_image(self, add_noise: Method) -> Method:
        def noising(*args: Any, **kwargs: Any) -> Any:
            if self._has_stepped:
                self._image = next(iter((*args, *kwargs.values())), None)
            return add_noise(*args, **kwargs)

        return noising
