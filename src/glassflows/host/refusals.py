"""Pipelines that cannot be steered: their rows have state that resampling would not reach."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import ModularPipeline


class UnsteerablePipeline(ValueError):
    """A pipeline whose particles cannot be moved."""

    def __init__(self, pipe: Any, reason: str) -> None:
        super().__init__(f"{type(pipe).__name__} cannot be steered: {reason}")


_CLASSES = {
    "it runs its scheduler chunk by chunk and keeps a history of each row": (
        "AnyFlowFARPipeline",
        "Cosmos2_5_TransferPipeline",
        "HeliosPipeline",
        "HunyuanVideoFramepackPipeline",
        "LTXI2VLongMultiPromptPipeline",
        "MarigoldDepthPipeline",
        "MarigoldIntrinsicsPipeline",
        "MarigoldNormalsPipeline",
        "WanAnimatePipeline",
    ),
    "it runs a scheduler of its own for every frame": (
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    ),
    "its guidance keeps a momentum of each row": ("AceStepPipeline",),
    "it draws one sample at a time": (
        "Cosmos3OmniPipeline",
        "DreamLiteMobilePipeline",
        "DreamLitePipeline",
    ),
    "its latents hold reference images beside the sample": (
        "JoyImageEditPipeline",
        "JoyImageEditPlusPipeline",
    ),
    "it deals out its images wrongly for more than one row": ("QwenImageLayeredPipeline",),
    "it draws one video at a time": ("MotifVideoImage2VideoPipeline", "WanVACEPipeline"),
}
_COMBINED = {
    "decoder_pipe": "with the embeddings that pipe.prior_pipe returns",
    "generation_pipe": "and hand its images to pipe.upsampling_pipe (VisualCloze)",
}
"""The pipelines inside a combined one, which have schedulers of their own, and how to use them."""

_REASONS = {name: reason for reason, names in _CLASSES.items() for name in names}


def class_names(pipe: Any) -> list[str]:
    """Return the names of a pipeline's class and of those it derives from, its own first."""
    return [cls.__name__ for cls in type(pipe).__mro__]


def has_safety_checker(pipe: Any) -> bool:
    """Return whether a safety checker judges the pipeline's images; nothing may go past it."""
    return getattr(pipe, "safety_checker", None) is not None


def is_one_of(pipe: Any, names: tuple[str, ...]) -> bool:
    """Return whether a pipeline is of a class whose name begins with one of these."""
    return any(name.startswith(names) for name in class_names(pipe))


def check_steerable(pipe: Any) -> None:
    """Refuse a pipeline whose rows have state that cannot be moved.

    Raises:
        UnsteerablePipeline: with the reason.
    """
    if reason := next(_reasons(pipe), None):
        raise UnsteerablePipeline(pipe, reason)


def _reasons(pipe: Any) -> Iterator[str]:
    if isinstance(pipe, ModularPipeline):
        yield "modular pipelines have a call of their own: steer the pipeline class it stands for"
    for inner, how in _COMBINED.items():
        if hasattr(pipe, inner):
            yield f"it hands its call to others: steer pipe.{inner}, {how}"
    if getattr(pipe, "scheduler", None) is None:
        yield "it has no component named scheduler"
    for name in class_names(pipe):
        if name in _REASONS:
            yield _REASONS[name]
    if getattr(pipe, "audio_scheduler", None) is not None:
        yield "its sound has a scheduler of its own: leave out the component audio_scheduler"
    for name, component in pipe.components.items():
        yield from _reasons_of_component(name, component)


def _reasons_of_component(name: str, component: Any) -> Iterator[str]:
    momentum = "adaptive_projected_guidance_momentum"
    if getattr(component, momentum, None):
        yield f"its {name} keeps a momentum of each row: set pipe.{name}.{momentum}=None"
    if getattr(getattr(component, "config", None), "use_meanflow", False):
        yield f"{name} was distilled to jump (mean flow), so it gives no denoised mean"
    for module in component.modules() if isinstance(component, torch.nn.Module) else ():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if any(hook._is_stateful for hook in hooks.values()):
            yield (
                f"{name} caches features of each row: call pipe.{name}.disable_cache(), or load it "
                "anew"
            )


_COUNTERS = {
    "adapter_conditioning_factor",
    "edit_warmup_steps",
    "gligen_scheduled_sampling_beta",
    "max_iter_to_alter",
    "sld_warmup_steps",
}
"""Arguments of pipelines that count their steps whatever the value."""

_WINDOWS = {
    "control_guidance_start": 0.0,
    "control_guidance_end": 1.0,
    "cfg_trunc_ratio": 1.0,
    "skip_guidance_layers": None,
    "denoising_start": None,
    "denoising_end": None,
}
"""Arguments by which a pipeline counts its steps, and the values with which it need not."""


def check_counts_no_steps(pipe: Any, given: Mapping[str, Any]) -> None:
    """Refuse excursions of a call that does something at some fraction of its steps.

    Args:
        pipe: The pipeline.
        given: The keyword arguments of its call.

    Raises:
        ValueError: with the argument.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    for name in _COUNTERS & parameters.keys():
        raise ValueError(
            f"look_ahead: expected a pipeline that does the same at all steps, got "
            f"{type(pipe).__name__}, whose {name} counts them, excursions among them: leave "
            "look_ahead out"
        )
    for name, everywhere in _WINDOWS.items():
        if name not in parameters:
            continue
        asked = given.get(name, parameters[name].default)
        values = asked if isinstance(asked, (list, tuple)) else [asked]
        if any(value != everywhere for value in values):
            raise ValueError(
                f"look_ahead: expected {name}={everywhere}, got {asked!r}, by which "
                f"{type(pipe).__name__} counts its steps, excursions among them: leave {name} or "
                "look_ahead out"
            )
