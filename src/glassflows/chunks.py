"""Run a pipeline's networks over a few particles at a time, inside the pipeline's own loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

NETWORKS = ("transformer", "transformer_2", "unconditional_transformer", "unet", "controlnet", "prior")

_NOT_ROWS = ("img_ids", "txt_ids")  # positions, which may be as many as there are rows


@contextmanager
def chunked(pipe: Any, number: int, size: int | None) -> Iterator[None]:
    """Let each network of a pipeline see at most `size` of `number` particles at a time, guidance rows with their own.

    Args:
        pipe: The pipeline; its networks are as they were afterwards.
        number: Rows of the pipeline's batch without guidance, prompts × particles.
        size: Particles at a time; None for all.
    """
    modules = [getattr(pipe, name, None) for name in NETWORKS] if size is not None and size < number else []
    wrapped = [(module, vars(module).get("forward")) for module in modules if isinstance(module, torch.nn.Module)]
    for module, _ in wrapped:
        module.forward = _in_chunks(module.forward, number, size or number)
    ours = [module.forward for module, _ in wrapped]
    try:
        yield
    finally:
        for (module, own), forward in zip(wrapped, ours, strict=True):
            if vars(module).get("forward") is not forward:
                continue  # offloading hooks were taken off and put on anew in between
            if own is None:
                del module.forward
            else:
                module.forward = own


@contextmanager
def lowering(name: str) -> Iterator[None]:
    """Say of an out-of-memory error which batch size to lower; the innermost of nested ones is right."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if "of FeynmanKacSteerer" in str(error):
            raise
        raise torch.OutOfMemoryError(f"{error} (lower {name} of FeynmanKacSteerer)") from error


def _in_chunks(forward: Callable[..., Any], number: int, size: int) -> Callable[..., Any]:
    """Return a forward that calls another for some particles at a time and puts the outputs together."""

    @wraps(forward)
    def in_chunks(*args: Any, **kwargs: Any) -> Any:
        batch = next((value for value in (*args, *kwargs.values()) if _is_batch(value)), ())
        rows, listed = len(batch), isinstance(batch, list)
        if rows < number or rows % number:
            return forward(*args, **kwargs)
        order = torch.arange(rows).view(-1, number)  # one row of it per copy of the particles
        outputs, chosen = [], [chunk.flatten() for chunk in order.split(size, 1)]
        for chunk in chosen:
            some = [_take(value, chunk, rows, listed) for value in args]
            named = {
                name: value if name in _NOT_ROWS else _take(value, chunk, rows, listed)
                for name, value in kwargs.items()
            }
            outputs.append(forward(*some, **named))
        return _joined(outputs, torch.cat(chosen).argsort(), listed)

    return in_chunks


def _is_batch(value: Any) -> bool:
    """Whether an argument is the network's input: a tensor of at least two dimensions, or a list of one per row."""
    tensors = isinstance(value, list) and len(value) > 0 and isinstance(value[0], Tensor)
    return tensors or (isinstance(value, Tensor) and value.ndim > 1)


def _take(value: Any, chosen: Tensor, rows: int, listed: bool) -> Any:
    """Return the chosen rows of an argument that has `rows` of them, in whatever it is nested; anything else as is.

    Args:
        listed: Whether batches are lists of one tensor per row (Z-Image).
    """
    if isinstance(value, Tensor):
        return value[chosen.to(value.device)] if value.ndim > 0 and len(value) == rows else value
    if isinstance(value, dict):
        return {name: _take(one, chosen, rows, listed) for name, one in value.items()}
    if listed and isinstance(value, list) and len(value) == rows:
        return [value[i] for i in chosen.tolist()]
    if isinstance(value, (list, tuple)):
        return type(value)(_take(one, chosen, rows, listed) for one in value)
    return value


def _joined(outputs: list[Any], back: Tensor, listed: bool) -> Any:
    """Put the outputs of the chunks together, in the order of the rows."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)[back.to(first.device)]
    if isinstance(first, dict):  # diffusers' output classes are dictionaries
        return type(first)(**{name: _joined([out[name] for out in outputs], back, listed) for name in first})
    if listed and isinstance(first, list):
        everything = [one for out in outputs for one in out]
        return [everything[i] for i in back.tolist()]
    if isinstance(first, (list, tuple)):
        return type(first)(_joined(list(parts), back, listed) for parts in zip(*outputs, strict=True))
    return first
