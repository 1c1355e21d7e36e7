"""The arguments of a call, checked before anything is drawn, and what they ask to have returned."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch

from ..host.batch import COUNTS
from ..host.outputs import OUTPUT_TYPES
from ..host.refusals import has_safety_checker
from .strategy import is_whole

Select = Literal["all", "best", "best_seen", "sample"]


class Wanted(NamedTuple):
    """What a call is to return: in which form, which samples, how many of each prompt.

    None is for all that live in the end.
    """

    output_type: str
    select: Select
    num_images_per_prompt: int | None


def take_wanted(
    given: dict[str, Any], select: Select, pipe: Any, widths: Sequence[int], looks_ahead: bool
) -> Wanted:
    """Take out of a call's keyword arguments what it is to return.

    Args:
        given: The keyword arguments.
        select: Which samples.
        pipe: The pipeline.
        widths: How many particles of a prompt live in each part of the run.
        looks_ahead: Whether samples of their futures are drawn on the way.

    Raises:
        ValueError: if it cannot be returned.
    """
    output_type = given.pop("output_type", "pil")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(
            f'output_type: expected "pil", "np", "pt" or "latent", got {output_type!r}'
        )
    if select not in get_args(Select):
        raise ValueError(f"select: expected one of {get_args(Select)}, got {select!r}")
    counts: list[Any] = [given.pop(name, None) for name in COUNTS]
    one_each = select in ("best", "best_seen")
    default = 1 if one_each else None
    number: Any = next((count for count in counts if count is not None), default)
    if number is not None and not (is_whole(number) and 1 <= number <= widths[-1]):
        most = f"num_particles={widths[-1]}"
        if len(widths) > 1:
            most = f"{widths[-1]}, the last of widths={widths}"
        raise ValueError(f"num_images_per_prompt: expected 1 to {most}, got {number!r}")
    if select == "best_seen":
        _check_best_seen(number, pipe, looks_ahead)
    return Wanted(output_type, select, number)


def _check_best_seen(number: Any, pipe: Any, looks_ahead: bool) -> None:
    """Check that images are seen on the way, and that they may be returned."""
    if not looks_ahead:
        raise ValueError(
            'select="best_seen": expected look_ahead of at least 1, which sees images on the way, '
            'got 0: set it, or take select="best"'
        )
    if number != 1:
        raise ValueError(
            f'select="best_seen": expected num_images_per_prompt of 1, got {number}: leave it out'
        )
    if has_safety_checker(pipe):
        raise ValueError(
            'select="best_seen": expected a pipeline without a safety checker, past which no image '
            f'goes, got {type(pipe).__name__} with one: take select="best"'
        )


def check_not_options(given: Mapping[str, Any], options: Collection[str], steerer: Any) -> None:
    """Raise TypeError if an argument is an option of the steerer, and none of the pipeline.

    Args:
        given: The keyword arguments.
        options: The names of the options.
        steerer: The steerer that was called.
    """
    pipe, own = type(steerer.pipe), type(steerer).__name__
    taken = inspect.signature(pipe.__call__).parameters
    for name in given:
        if name in options and name not in taken:
            raise TypeError(
                f"{name} belongs to the constructor: expected an argument of {pipe.__name__}, got "
                f"an option of {own}: {own}(pipe, reward, …, {name}=…)"
            )


def check_prompt(prompt: Any) -> None:
    """Raise ValueError unless a prompt is a text, or a list of at least one, or None.

    Some pipelines take structured prompts, dictionaries, in a list.
    """
    listed = isinstance(prompt, (list, tuple)) and len(prompt) > 0
    if prompt is None or isinstance(prompt, str):
        return
    if not listed or not all(isinstance(one, (str, dict)) for one in prompt):
        raise ValueError(
            f"prompt: expected a text, or a list of texts and at least one, got {prompt!r:.80} "
            f"({type(prompt).__name__}): leave it out where the pipeline takes no prompt, and make "
            "a list of an array, prompts.tolist()"
        )


def check_generator(generator: Any) -> None:
    """Raise ValueError unless a generator is one of torch's, or a list of them, or None."""
    generators = generator if isinstance(generator, list) else [generator]
    are_torchs = [isinstance(one, torch.Generator) for one in generators]
    if generator is not None and not (are_torchs and all(are_torchs)):
        raise ValueError(
            f"generator: expected a torch.Generator, or a list of them, got {generator!r:.80}: for "
            "a seed pass torch.Generator().manual_seed(seed)"
        )
