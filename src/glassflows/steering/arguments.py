"""The arguments of a call, checked before anything is drawn."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch


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
