"""The arguments of a call → those of a batch with one row per particle, prompt-major.

Particles of prompt j are rows jK … jK + K − 1. Which arguments have a row per prompt is decided by
their names. One prompt may be repeated by the pipeline, which is told the count. Several are
repeated here, with all that belongs to them: many pipelines repeat masks the other way round than
embeddings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from .inpainting import CROPPED, crops_to_mask
from .refusals import UnsteerablePipeline, class_names, is_one_of

COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")

_SIGNS = ("", "negative_")
_WORDS = {f"{sign}prompt{i}" for sign in _SIGNS for i in ("", "_2", "_3", "_4")} | {"transcription"}
_EMBEDDINGS = {
    f"{sign}{name}"
    for sign in _SIGNS
    for name in (
        "prompt_embeds",
        "prompt_embeds_2",
        "prompt_embeds_clip",
        "prompt_embeds_qwen",
        "prompt_embeds_t5",
        "pooled_prompt_embeds",
        "generated_prompt_embeds",
        "image_embeds",
        "prompt_embeds_mask",
        "prompt_embeds_mask_2",
        "prompt_attention_mask",
        "prompt_attention_mask_2",
        "attention_mask",
        "encoder_attention_mask",
    )
} | {"class_labels", "controlnet_pooled_projections", "id_cond", "prior_token_ids"}
_LAYERED = {f"{sign}prompt_embeds_llama3" for sign in _SIGNS}
"""Tensors (layers, rows, …)."""

_LISTS_OF_LAYERS = {"id_vit_hidden"}
"""Lists of one tensor (rows, …) for each layer."""

_ENDS = {f"{sign}prompt_cu_seqlens" for sign in _SIGNS}
"""Where the tokens of each prompt end, after a zero in front."""

_PICTURES = {
    "image",
    "mask_image",
    "masked_image_latents",
    "control_image",
    "control_mask",
    "depth_map",
    "hint",
    "image_reference",
    "last_image",
    "original_image",
}
_MAPS = {"mask_image", "control_mask", "depth_map"}
"""Of these an image may have no axis of channels."""

_VIDEOS = {"video", "mask_video", "masked_video_latents", "control_video", "conditioning_frames"}
_SOUNDS = {"audio", "initial_audio_waveforms"}

_COUNT_FAILS = (
    "AllegroPipeline",
    "AnimateDiff",
    "AudioLDM2Pipeline",
    "ChronoEditPipeline",
    "CogVideoX",
    "ConsisIDPipeline",
    "Cosmos2_5",
    "EasyAnimateInpaintPipeline",
    "HunyuanSkyreelsImageToVideoPipeline",
    "HunyuanVideo15",
    "HunyuanVideoImageToVideoPipeline",
    "Kandinsky5I2IPipeline",
    "LTXConditionPipeline",
    "LucyEditPipeline",
    "SanaImageToVideoPipeline",
    "SkyReelsV2ImageToVideoPipeline",
    "WanImageToVideoPipeline",
    "WanVideoToVideoPipeline",
    "ZImageControlNetInpaintPipeline",
)
"""They repeat nothing by their count, or not all of it."""

_COUNT_ONLY = (
    "LongCatImageEditPipeline",
    "OmniGenPipeline",
    "QwenImageEditPlusPipeline",
    "ShapEImg2ImgPipeline",
    "VisualClozeGenerationPipeline",
)
"""They take one prompt, and make the rows themselves (OmniGen has the positions of the first)."""

_REFERENCES = (
    "BriaFibo2Pipeline",
    "BriaFiboEditPipeline",
    "Flux2Pipeline",
    "Flux2KleinPipeline",
    "Flux2KleinKVPipeline",
    "GlmImagePipeline",
    "QwenImage21Pipeline",
    "QwenImageEditPlusPipeline",
    "VisualClozeGenerationPipeline",
    "ZImageOmniPipeline",
)
"""Their `image` lists references for all prompts."""

_REFERENCES_EACH = {
    "GlmImagePipeline": ("image", "prior_token_image_ids", "source_image_grid_thw"),
}
"""They take a list of references, and of what belongs to these, for each prompt."""

_ONE_FOR_ALL: dict[str, tuple[str, ...]] = {
    "AnimateDiffControlNetPipeline": ("conditioning_frames",),
    "AnimateDiffSparseControlNetPipeline": ("conditioning_frames",),
    "ChronoEditPipeline": ("image", "image_embeds"),
    "ConsisIDPipeline": ("id_cond", "id_vit_hidden"),
    "HunyuanVideo15ImageToVideoPipeline": ("image",),
    "SanaImageToVideoPipeline": ("image",),
    "SkyReelsV2ImageToVideoPipeline": ("image", "image_embeds", "last_image"),
    "WanImageToVideoPipeline": ("image", "image_embeds", "last_image"),
}
"""What they take one of, for all prompts."""

_PROMPTS_FIRST = ("StableDiffusionControlNetPipeline", "StableDiffusionControlNetPAGPipeline")
"""Of several networks they take a list for each prompt, others a list for each network."""

_KEYFRAMES = {"LTXConditionPipeline": ("image", "video")}
"""Their images, or videos, are one for each keyframe."""

_ONE_ROW = {"Cosmos2_5_PredictBasePipeline": ("image", "video")}
"""With these they draw one sample."""

_TENSORS_ONLY = ("LDMSuperResolutionPipeline",)
"""They take several images as a tensor alone."""


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

    Without prompts and embeddings every image counts as a prompt, and so does every sample that a
    `batch_size` asks for.

    Args:
        pipe: The pipeline.
        given: The keyword arguments it was called with.
        number: K.

    Raises:
        ValueError: if an argument has neither one row nor one for each prompt, or latents not one
            for each particle. What the pipeline checks itself is the pipeline's to refuse.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    given = {name: _listed(value) if name in _WORDS else value for name, value in given.items()}
    prompt = given.get("prompt")
    prompts: list[str | None] = [prompt] if isinstance(prompt, str) else list(prompt or ())
    groups = len(prompts) or _number_of_prompts(pipe, given)
    if groups > 1 and is_one_of(pipe, _COUNT_ONLY):
        raise UnsteerablePipeline(pipe, f"it takes one prompt at a time, got {groups}")
    alone = _of_class(pipe, _ONE_ROW)
    if groups * number > 1 and any(given.get(name) is not None for name in alone):
        raise UnsteerablePipeline(pipe, f"it draws one sample at a time of {' or '.join(alone)}")
    _check_one_each(pipe, given, groups)
    for name in ("latents", "audio_latents"):
        _check_latents(name, given.get(name), groups, number)
    count = next((name for name in COUNTS if name in parameters), None)
    if count and groups == 1 and _honours_count(pipe, bool(prompts), given):
        arguments = {**given, count: number}
    elif "batch_size" in parameters and given.get("image") is None:  # unconditional
        arguments = {**given, "batch_size": groups * number}
    else:
        whole = CROPPED if crops_to_mask(given) else ()
        arguments = {
            name: value if name in whole else _rows(pipe, name, value, groups, number)
            for name, value in given.items()
        }
    if "prompt" in parameters and parameters["prompt"].default is inspect.Parameter.empty:
        arguments.setdefault("prompt", None)
    return Batch(arguments, [one for one in prompts or [None] * groups for _ in range(number)])


def _check_one_each(pipe: Any, given: Mapping[str, Any], groups: int) -> None:
    """Refuse several images for one prompt, between which its particles would be dealt out."""
    lists = _references(pipe) | set(_of_class(pipe, _KEYFRAMES))
    for name, value in given.items():
        if value is None or name in lists or name not in _PICTURES | _VIDEOS | _SOUNDS:
            continue
        if (got := len(_samples(name, value))) not in (1, groups):
            raise _wrong_number(name, groups, got)


def _check_latents(name: str, latents: Any, groups: int, number: int) -> None:
    if isinstance(latents, Tensor) and (latents.ndim == 0 or len(latents) != groups * number):
        rows = len(latents) if latents.ndim else 0
        raise ValueError(
            f"{name}: expected prompts × num_particles = {groups * number} rows, one for each "
            f"particle, got {rows}: draw them for every particle, or leave them out"
        )


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


_FEWER_ROWS = ("AnimateDiff", "PRX")
"""They give their networks times, or frames of a control, for fewer rows than there are."""


_FRAMES_TO_CONTROL = ("AnimateDiffControlNet", "AnimateDiffVideoToVideoControlNet")
"""They call their ControlNet with the frames of all videos as rows."""


def gives_frames_to(pipe: Any, network: Any) -> bool:
    """Return whether a pipeline calls a network with frames as rows, those of a video together."""
    return is_one_of(pipe, _FRAMES_TO_CONTROL) and network is pipe.controlnet


def gives_fewer_rows(pipe: Any) -> bool:
    """Return whether a pipeline's networks are to be given what they lack by `completing_rows`."""
    return is_one_of(pipe, _FEWER_ROWS)


def completing_rows(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a network's forward that is given times and controls for every row.

    Some pipelines give them for one prompt, or once for each half of guidance: times (PRX), and the
    frames of a control (AnimateDiff), whose rows are those of all frames.
    """

    @wraps(forward)
    def completing(*args: Any, **kwargs: Any) -> Any:
        sample = args[0] if args else kwargs.get("hidden_states")
        rows = len(sample) if isinstance(sample, Tensor) else 0
        time, controls = kwargs.get("timestep"), kwargs.get("controlnet_cond")
        if isinstance(time, Tensor) and time.ndim == 1 and 1 < len(time) < rows:
            kwargs["timestep"] = time.repeat_interleave(rows // len(time))
        if isinstance(controls, Tensor):
            kwargs["controlnet_cond"] = _tiled(controls, rows)
        if isinstance(controls, list):
            kwargs["controlnet_cond"] = [_tiled(one, rows) for one in controls]
        return forward(*args, **kwargs)

    return completing


def gives_one_image(pipe: Any) -> bool:
    """Return whether a pipeline encodes negative prompts beside one image, whatever their number.

    HunyuanVideo's Llava sees a black one with each.
    """
    return is_one_of(pipe, ("HunyuanVideoImageToVideoPipeline",))


def repeating_image(encode_prompt: Callable[..., Any]) -> Callable[..., Any]:
    """Return an `encode_prompt` that repeats one image for every prompt."""

    @wraps(encode_prompt)
    def encoding(*args: Any, **kwargs: Any) -> Any:
        prompt, image = kwargs.get("prompt"), kwargs.get("image")
        if isinstance(prompt, list) and isinstance(image, Image):
            kwargs["image"] = [image] * len(prompt)
        return encode_prompt(*args, **kwargs)

    return encoding


def _tiled(control: Any, rows: int) -> Any:
    frames = isinstance(control, Tensor) and control.ndim == 4 and 1 < len(control) < rows
    return control.repeat(rows // len(control), 1, 1, 1) if frames else control


def _of_class(pipe: Any, table: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the entry of a pipeline's class, or of one that it derives from."""
    return next((table[name] for name in class_names(pipe) if name in table), ())


def _listed(texts: Any) -> Any:
    """Return the texts of a tuple or an array as a list; one text as it is."""
    if isinstance(texts, np.ndarray):
        return texts.tolist()
    return list(texts) if isinstance(texts, tuple) else texts


def _honours_count(pipe: Any, prompted: bool, given: Mapping[str, Any]) -> bool:
    """Return whether a pipeline repeats its one prompt by its count, and all that belongs to it.

    It does not repeat an image for a list of generators.
    """
    if is_one_of(pipe, _COUNT_ONLY):
        return True
    if is_one_of(pipe, _COUNT_FAILS) or isinstance(given.get("generator"), list):
        return False
    return prompted or not any(map(_is_embedding, given))


def _is_embedding(name: str) -> bool:
    return name in _EMBEDDINGS | _LAYERED or "prompt_embed" in name


def _number_of_prompts(pipe: Any, given: Mapping[str, Any]) -> int:
    """Return the number of prompts of a call that has no words."""
    embedded = [
        1 if isinstance(value, int) else _length(name, value)
        for name, value in given.items()
        if value is not None and _is_embedding(name)
    ]
    if embedded:
        return max(embedded)
    for name in ("image", "audio", "video"):
        if given.get(name) is not None and name not in _references(pipe):
            return len(_samples(name, given[name]))
    return given.get("batch_size") or 1


def _length(name: str, value: Any) -> int:
    if name in _LISTS_OF_LAYERS:
        return len(value[0])
    return value.shape[1] if name in _LAYERED else len(value)


def _references(pipe: Any) -> set[str]:
    """Return the arguments whose list is for all prompts: references, or an image per network."""
    names = {"image"} if is_one_of(pipe, _REFERENCES) else set()
    return names | _per_network(pipe)


def _per_network(pipe: Any) -> set[str]:
    """Return the arguments that list an image for each of several networks."""
    networks = [type(getattr(pipe, name, None)).__name__ for name in ("controlnet", "adapter")]
    if not any("Multi" in name or "Union" in name for name in networks):
        return set()
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "conditioning_frames" in parameters:
        return {"conditioning_frames"}
    return {"control_image", "control_mask"} if "control_image" in parameters else {"image"}


def _rows(pipe: Any, name: str, value: Any, groups: int, number: int) -> Any:
    """Return an argument with one row per particle, if it has rows; others as they are."""
    if value is None:
        return value
    if name in _per_network(pipe):
        return _rows_per_network(pipe, name, value, groups, number)
    if name in _of_class(pipe, _REFERENCES_EACH) and len(value) > 0:
        of_one = name == "image" and not isinstance(value[0], list)
        return _repeated(name, [value] if of_one else value, groups, number)
    if name in _references(pipe):
        return value
    if name in _of_class(pipe, _ONE_FOR_ALL):
        embedded = name in _LISTS_OF_LAYERS or _is_embedding(name)
        count = _length(name, value) if embedded else len(_samples(name, value))
        if count > 1:
            raise UnsteerablePipeline(pipe, f"it takes one {name} for all prompts, got {count}")
        return value
    if name in _LAYERED:
        return value.repeat_interleave(number, 1)
    if name in _LISTS_OF_LAYERS:
        return [_repeated(name, one, groups, number) for one in value]
    if name in _ENDS:
        lengths = _repeated(name, value.diff(), groups, number)
        return torch.cat([value[:1], lengths.cumsum(0).to(value)])
    if name == "conditions":
        return _conditions(value, groups, number)
    if name in _of_class(pipe, _KEYFRAMES):
        films = value if isinstance(value, list) else [value]
        return [_rows_of_film(name, film, groups, number) for film in films]
    if name in _WORDS and isinstance(value, str):
        value = [value]
    if name in _PICTURES | _VIDEOS | _SOUNDS:
        value = _samples(name, value)
        if isinstance(value, list) and is_one_of(pipe, _TENSORS_ONLY):
            raise UnsteerablePipeline(
                pipe, f"it takes more than one {name} only as a tensor (N, 3, H, W)"
            )
    elif not (name in _WORDS or _is_embedding(name)):
        return value
    return _repeated(name, value, groups, number)


def _rows_per_network(pipe: Any, name: str, value: Any, groups: int, number: int) -> Any:
    """Return what each of several networks is shown, with one row per particle.

    One image for all prompts is repeated by the pipeline, unless it is that of an adapter.
    """
    if not isinstance(value, list) or not value or name in _of_class(pipe, _ONE_FOR_ALL):
        return value
    if isinstance(value[0], list) and is_one_of(pipe, _PROMPTS_FIRST):
        return _repeated(name, value, groups, number)
    by_pipeline = Image if getattr(pipe, "adapter", None) is None else ()
    return [
        one
        if isinstance(one, by_pipeline)
        else _repeated(name, _samples(name, one), groups, number)
        for one in value
    ]


def _repeated(name: str, value: Any, groups: int, number: int) -> Any:
    """Return what is there once, or once for each prompt, once for each particle.

    Raises:
        ValueError: if there is another number of it.
    """
    if len(value) not in (1, groups):
        raise _wrong_number(name, groups, len(value))
    times = number if len(value) == groups else groups * number
    if isinstance(value, Tensor):
        return value.repeat_interleave(times, 0)
    if isinstance(value, np.ndarray):
        return value.repeat(times, 0)
    return [one for one in value for _ in range(times)]


def _wrong_number(name: str, groups: int, got: int) -> ValueError:
    return ValueError(f"{name}: expected one, or one for each prompt, {groups}, got {got}")


def _conditions(value: Any, groups: int, number: int) -> Any:
    """Return keyframes (LTX) of all prompts with their images or videos for each particle."""
    conditions = value if isinstance(value, list) else [value]
    made = []
    for condition in conditions:
        films = {name: getattr(condition, name, None) for name in ("image", "video")}
        rows = {name: _rows_of_film(name, film, groups, number) for name, film in films.items()}
        made.append(
            replace(condition, **{name: film for name, film in rows.items() if film is not None})
        )
    return made


def _rows_of_film(name: str, film: Any, groups: int, number: int) -> Any:
    """Return a keyframe, or a video of them, for each particle; None of none."""
    return None if film is None else _repeated(name, _samples(name, film), groups, number)


def _samples(name: str, value: Any) -> Any:
    """Return images, videos or sounds as a tensor, an array or a list with one entry for each."""
    if isinstance(value, Tensor | np.ndarray):
        return value if value.ndim > _dimensions(name, value) else value[None]
    if not isinstance(value, list):
        return [value]
    is_video = name in _VIDEOS and not isinstance(value[0], list) and not _is_video(value[0])
    return [value] if is_video else value


def _is_video(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray) and value.ndim > 3 and len(value) > 1


def _dimensions(name: str, value: Any) -> int:
    """Return the dimensions of one sample as a tensor or an array."""
    if name in _SOUNDS:
        return 2
    if name in _VIDEOS:
        return 4
    if name in _MAPS and value.ndim < 4:
        return 2
    return 1 if value.ndim == 2 else 3  # what a prior starts from is an embedding
