"""The arguments of a call → those of a batch with one row per particle, prompt-major.

Particles of prompt j are rows jK … jK + K − 1. Where the pipeline repeats its prompts itself, it is
told the count; elsewhere every argument that has a row per prompt is repeated here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")

_IMAGES = (
    "image",
    "mask_image",
    "control_image",
    "control_mask",
    "image_latents",
    "masked_image_latents",
)
_IGNORE_COUNT = (
    "AllegroPipeline",
    "AnimateDiff",
    "AudioLDM2Pipeline",
    "CogVideoX",
    "ConsisIDPipeline",
    "WanVideoToVideoPipeline",
)
"""They set the count to 1 themselves, or do with it what they do with no list of prompts."""

_TAKE_REFERENCES = (
    "BriaFibo2Pipeline",
    "BriaFiboEditPipeline",
    "Flux2",
    "GlmImagePipeline",
    "QwenImage21Pipeline",
    "QwenImageEditPlusPipeline",
    "ZImageOmniPipeline",
)
"""Their `image` lists references for all prompts."""

_COUNT_EMBEDDINGS = ("QwenImageEditPlusPipeline",)
"""They take no more embeddings than one, but make the rows themselves."""


class Batch(NamedTuple):
    """A call laid out.

    Args:
        arguments: The keyword arguments of the pipeline.
        prompts: The prompt of each particle; None where only embeddings were given.
    """

    arguments: dict[str, Any]
    prompts: list[str | None]


def lay_out(pipe: Any, given: Mapping[str, Any], number: int) -> Batch:
    """Lay out `number` particles of each prompt.

    Without prompts and embeddings every image counts as a prompt.

    Args:
        pipe: The pipeline.
        given: The keyword arguments it was called with.
        number: K.

    Raises:
        ValueError: if there are as many images as particles. Any other wrong number is the
            pipeline's to refuse.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    prompt = given.get("prompt")
    prompts: list[str | None] = [prompt] if isinstance(prompt, str) else list(prompt or ())
    if prompts and not isinstance(prompt, str):
        given = {**given, "prompt": prompts}  # of a tuple
    per_prompt = _arguments_per_prompt(pipe)
    images = {name: _number_of_images(given[name]) for name in per_prompt & given.keys()}
    embedded = [value for name, value in given.items() if _is_embedding(name) and value is not None]
    groups = len(prompts) or next(map(len, embedded), images.get("image") or 1)
    if number > 1 and images.get("image") == groups * number:
        # the particles of a prompt would start from several images
        raise ValueError(
            f"image: expected one, or one for each prompt, {groups}, got {images['image']}"
        )
    count = next((name for name in COUNTS if name in parameters), None)
    own_images = groups > 1 and groups in images.values()
    if count and not own_images and _honours_count(pipe, bool(prompts), given):
        arguments = {**given, count: number}
    elif "batch_size" in parameters:  # unconditional
        groups, arguments = 1, {**given, "batch_size": number}
    else:
        shared = set(_IMAGES) - per_prompt
        arguments = {
            name: value if name in shared else _repeated(name, value, groups, number)
            for name, value in given.items()
        }
    if "prompt" in parameters and parameters["prompt"].default is inspect.Parameter.empty:
        arguments.setdefault("prompt", None)
    return Batch(arguments, [one for one in prompts or [None] * groups for _ in range(number)])


def generator_per_particle(generator: Any, number: int, particles: int) -> Any:
    """Return a list of one generator per prompt as one per particle, seeded by it in turn.

    Args:
        generator: What the call was given; anything but such a list is returned as it is.
        number: Number of rows.
        particles: K.
    """
    per_prompt = isinstance(generator, list) and len(generator) * particles == number
    if not per_prompt or particles == 1:
        return generator
    seeds = [
        torch.randint(2**62, (particles,), generator=one, device=one.device) for one in generator
    ]
    return [torch.Generator().manual_seed(seed) for group in seeds for seed in group.tolist()]


def copies_of_rows(x_t: Tensor, number: int) -> int | None:
    """Return how often the rows of `number` particles occur in a sample; None if they do not.

    Guidance may double them (DiT).
    """
    copies, rest = divmod(len(x_t), number)
    if copies < 1 or rest:
        return None
    if copies > 1 and not torch.equal(x_t, torch.cat([x_t[:number]] * copies)):
        return None
    return copies


def _honours_count(pipe: Any, prompted: bool, given: Mapping[str, Any]) -> bool:
    """Return whether a pipeline repeats what it is given by its count."""
    name = type(pipe).__name__
    if name.startswith(_IGNORE_COUNT):
        return False
    return prompted or name in _COUNT_EMBEDDINGS or not any(map(_is_embedding, given))


def _is_embedding(name: str) -> bool:
    return "embed" in name or name == "class_labels"


def _arguments_per_prompt(pipe: Any) -> set[str]:
    """Return the arguments in which several images are one for each prompt.

    In the others they are references, or one for each of several networks.
    """
    names: set[str] = set(_IMAGES)
    if type(pipe).__name__.startswith(_TAKE_REFERENCES):
        names.remove("image")
    networks = [type(getattr(pipe, name, None)).__name__ for name in ("controlnet", "adapter")]
    if any("Multi" in name or "Union" in name for name in networks):
        beside = "control_image" in inspect.signature(type(pipe).__call__).parameters
        names -= {"control_image", "control_mask"} if beside else {"image"}
    return names


def _number_of_images(value: Any) -> int | None:
    """Return the number of images of an argument that holds some."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim > 3:
        return len(value)
    is_list = isinstance(value, list) and len(value) > 0
    if is_list and all(isinstance(one, Tensor | np.ndarray | Image) for one in value):
        return len(value)
    return None


def _repeated(name: str, value: Any, groups: int, number: int) -> Any:
    """Return `number` of each row of an argument that has one per prompt; others as they are."""
    if name in ("latents", "generator", "sigmas", "timesteps", "video") or "ip_adapter" in name:
        return value  # lists of frames and of adapters, among others
    if isinstance(value, str) and "prompt" in name:
        return [value] * (groups * number)
    if isinstance(value, Tensor) and value.ndim > 0 and len(value) == groups:
        return value.repeat_interleave(number, 0)
    if isinstance(value, np.ndarray) and value.ndim > 3 and len(value) == groups:
        return value.repeat(number, 0)
    if isinstance(value, list) and len(value) == groups:
        rows = (str, Tensor, np.ndarray, Image)
        if _is_embedding(name) or all(isinstance(one, rows) for one in value):
            return [one for one in value for _ in range(number)]
    return value
