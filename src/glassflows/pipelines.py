"""What is particular to a pipeline class under steering: how it lays out rows, what sizes it settles on, refusals."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import ModularPipeline
from PIL.Image import Image
from torch import Tensor

COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")

_IGNORE_COUNT = (  # they set it to 1 themselves, or do with it what they do with no list of prompts
    "AllegroPipeline", "AnimateDiff", "AudioLDM2Pipeline", "CogVideoX", "ConsisIDPipeline", "WanVideoToVideoPipeline",
)  # fmt: skip
_IMAGES = ("image", "mask_image", "control_image", "control_mask", "image_latents", "masked_image_latents")
_REFERENCES = (  # `image` lists references for all prompts
    "BriaFibo2Pipeline", "BriaFiboEditPipeline", "Flux2", "GlmImagePipeline", "QwenImage21Pipeline",
    "QwenImageEditPlusPipeline", "ZImageOmniPipeline",
)  # fmt: skip
_COUNT_EMBEDDINGS = ("QwenImageEditPlusPipeline",)  # they take no more rows than one, but make the rows themselves
_REASONS = {
    "it runs its scheduler chunk by chunk and keeps a history of each row": (
        "AnyFlowFARPipeline", "Cosmos2_5_TransferPipeline", "HeliosPipeline", "HunyuanVideoFramepackPipeline",
        "LTXI2VLongMultiPromptPipeline", "MarigoldDepthPipeline", "MarigoldIntrinsicsPipeline",
        "MarigoldNormalsPipeline", "WanAnimatePipeline",
    ),
    "it runs a scheduler of its own for every frame": (
        "SkyReelsV2DiffusionForcingPipeline", "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    ),
    "its guidance keeps a momentum of each row": ("AceStepPipeline",),
    "it draws one sample at a time": ("Cosmos3OmniPipeline", "DreamLiteMobilePipeline", "DreamLitePipeline"),
    "its latents hold reference images beside the sample": ("JoyImageEditPipeline", "JoyImageEditPlusPipeline"),
    "it deals out its images wrongly for more than one row": ("QwenImageLayeredPipeline",),
}  # fmt: skip
_UNSTEERABLE = {name: reason for reason, names in _REASONS.items() for name in names}


def check_steerable(pipe: Any) -> None:
    """Raise ValueError, with the reason, for a pipeline whose rows have state that resampling would not reach."""
    if reason := next(_reasons(pipe), None):
        raise ValueError(f"{type(pipe).__name__} cannot be steered: {reason}")


def _reasons(pipe: Any) -> Iterator[str]:
    if isinstance(pipe, ModularPipeline):
        yield "modular pipelines have a call of their own: steer the pipeline class it stands for"
    if hasattr(pipe, "decoder_pipe"):
        yield "it hands its call to others: steer pipe.decoder_pipe, with the embeddings that pipe.prior_pipe returns"
    if getattr(pipe, "scheduler", None) is None:
        yield "it has no component named scheduler"
    for cls in type(pipe).__mro__:
        if cls.__name__ in _UNSTEERABLE:
            yield _UNSTEERABLE[cls.__name__]
    if getattr(pipe, "audio_scheduler", None) is not None:
        yield "its sound has a scheduler of its own: leave out the component audio_scheduler"
    for name, component in pipe.components.items():
        if getattr(component, "adaptive_projected_guidance_momentum", None):
            yield f"its {name} keeps a momentum of each row: set pipe.{name}.adaptive_projected_guidance_momentum=None"
        if getattr(getattr(component, "config", None), "use_meanflow", False):
            yield f"{name} was distilled to jump (mean flow), so it gives no denoised mean"
        for module in component.modules() if isinstance(component, torch.nn.Module) else ():
            hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
            if any(hook._is_stateful for hook in hooks.values()):
                yield f"{name} caches features of each row: call pipe.{name}.disable_cache(), or load it anew"


def arranged(pipe: Any, given: Mapping[str, Any], number: int) -> tuple[dict[str, Any], list[str | None]]:
    """Lay out `number` samples of each prompt, prompt-major.

    By the pipeline's own count where a prompt is given and the count is honoured; else, and where every prompt has an
    image of its own, every argument with a row per prompt (prompts, embeddings, masks, images, class labels) gets
    `number` of each. Without prompts and embeddings every image is one.

    Returns:
        The arguments of the call, and the prompt of each sample, None where only embeddings were given.

    Raises:
        ValueError: if there are as many images as samples. Any other number that is wrong is the pipeline's to refuse.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    prompt = given.get("prompt")
    prompts: list[str | None] = [prompt] if isinstance(prompt, str) else list(prompt or ())
    if prompts and not isinstance(prompt, str):
        given = {**given, "prompt": prompts}  # of a tuple
    with_rows = _with_rows(pipe)
    images = {name: _rows(given[name]) for name in with_rows & given.keys()}
    ignored = type(pipe).__name__.startswith(_IGNORE_COUNT)
    count = None if ignored else next((name for name in COUNTS if name in parameters), None)
    embedded = [value for name, value in given.items() if "embed" in name or name == "class_labels"]
    groups = len(prompts) or next((len(value) for value in embedded if value is not None), images.get("image") or 1)
    own_images = groups > 1 and groups in images.values()
    if count and not own_images and (prompts or not embedded or type(pipe).__name__ in _COUNT_EMBEDDINGS):
        arguments = {**given, count: number}
    elif "batch_size" in parameters:  # unconditional
        groups, arguments = 1, {**given, "batch_size": number}
    else:
        shared = set(_IMAGES) - with_rows
        arguments = {
            name: value if name in shared else _repeated(name, value, groups, number) for name, value in given.items()
        }
    if number > 1 and images.get("image") == groups * number:  # the particles of a prompt would start from several
        raise ValueError(f"image: expected one, or one for each prompt, {groups}, got {images['image']}")
    if "prompt" in parameters and parameters["prompt"].default is inspect.Parameter.empty:
        arguments.setdefault("prompt", None)
    return arguments, [one for one in prompts or [None] * groups for _ in range(number)]


def _with_rows(pipe: Any) -> set[str]:
    """Return the arguments in which several images are one for each prompt, rather than references or one a network."""
    names: set[str] = set(_IMAGES)
    if type(pipe).__name__.startswith(_REFERENCES):
        names.remove("image")
    networks = [type(getattr(pipe, name, None)).__name__ for name in ("controlnet", "adapter")]
    if any("Multi" in name or "Union" in name for name in networks):
        beside = "control_image" in inspect.signature(type(pipe).__call__).parameters
        names -= {"control_image", "control_mask"} if beside else {"image"}
    return names


def _rows(value: Any) -> int | None:
    """Return the number of images of an argument that holds some."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim > 3:
        return len(value)
    is_list = isinstance(value, list) and value and all(isinstance(one, Tensor | np.ndarray | Image) for one in value)
    return len(value) if is_list else None


def _repeated(name: str, value: Any, groups: int, number: int) -> Any:
    """Return `number` of each row of an argument that has one per prompt; anything else as it is."""
    if name in ("latents", "generator", "sigmas", "timesteps", "video") or "ip_adapter" in name:
        return value  # lists of frames and of adapters, among others
    if isinstance(value, str) and "prompt" in name:
        return [value] * (groups * number)
    if isinstance(value, Tensor) and value.ndim > 0 and len(value) == groups:
        return value.repeat_interleave(number, 0)
    if isinstance(value, np.ndarray) and value.ndim > 3 and len(value) == groups:
        return value.repeat(number, 0)
    rows = isinstance(value, list) and len(value) == groups
    named = "embed" in name or name == "class_labels"
    if rows and (named or all(isinstance(one, str | Tensor | np.ndarray | Image) for one in value)):
        return [one for one in value for _ in range(number)]
    return value


@contextmanager
def settled_sizes(pipe: Any) -> Iterator[dict[str, int]]:
    """Fill a dictionary with the sizes that the pipeline prepares its latents for, while it runs.

    Many pipelines round the sizes they are given, or take them from an image (FLUX Kontext, Fill, Qwen-Image-Edit).
    """
    sizes: dict[str, int] = {}
    prepare = getattr(pipe, "prepare_latents", None)
    if prepare is None:
        yield sizes
        return
    names = list(inspect.signature(prepare).parameters)

    def recording(*args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        sizes.update({name: arguments[name] for name in ("height", "width", "num_frames") if arguments.get(name)})
        return prepare(*args, **kwargs)

    with replaced(pipe, "prepare_latents", recording):
        yield sizes


@contextmanager
def watched_bar(pipe: Any, watch: Callable[[Any], None]) -> Iterator[None]:
    """Hand every progress bar that the pipeline makes to `watch`."""
    make = getattr(pipe, "progress_bar", None)
    if make is None:
        yield
        return

    def making(*args: Any, **kwargs: Any) -> Any:
        bar = make(*args, **kwargs)
        watch(bar)
        return bar

    with replaced(pipe, "progress_bar", making):
        yield


@contextmanager
def replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Put a method in the place of an object's own, and that back afterwards, unless it was replaced in between.

    Offloading takes its hooks off a network, and puts them on anew, within a call.
    """
    own = vars(owner).get(name)
    vars(owner)[name] = method
    try:
        yield
    finally:
        if vars(owner).get(name) is method:
            if own is None:
                del vars(owner)[name]
            else:
                vars(owner)[name] = own


def layout(x_t: Tensor, number: int, pipe: Any) -> int:
    """Return how often the rows of `number` particles occur in the sample: twice where guidance doubles it (DiT).

    Raises:
        ValueError: if the rows of the sample are not those of the particles.
    """
    copies, rest = divmod(len(x_t), number)
    if copies < 1 or rest or (copies > 1 and not torch.equal(x_t, torch.cat([x_t[:number]] * copies))):
        raise ValueError(
            f"the pipeline runs {len(x_t)} rows, expected prompts × num_particles = {number}: "
            f"the way {type(pipe).__name__} lays out its batch is not supported"
        )
    return copies
