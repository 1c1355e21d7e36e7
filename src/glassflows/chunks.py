"""Run a pipeline's networks and its decoder over a few particles at a time, inside the pipeline's own loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .pipelines import replaced

NETWORKS = ("transformer", "transformer_2", "unconditional_transformer", "unet", "controlnet", "prior")
DECODERS = ("vae", "movq", "vqvae", "vqgan")

_NOT_ROWS = ("img_ids", "txt_ids")  # positions, which may be as many as there are rows


@contextmanager
def chunked(
    pipe: Any,
    number: int,
    *,
    particles: int | None,
    decodes: int | None,
    timing: Callable[[str], AbstractContextManager[None]],
) -> Iterator[None]:
    """Let a pipeline's networks and its decoder see so many of its particles at a time; they are as before afterwards.

    Args:
        pipe: The pipeline.
        number: Rows of the pipeline's batch without guidance, prompts × particles.
        particles: Particles that a network sees at a time, guidance rows with their own; None for all.
        decodes: Particles that the pipeline decodes at a time; None for all.
        timing: Takes the time of "network".
    """
    with ExitStack() as stack:
        for network in _modules(pipe, NETWORKS):
            # a module compiled in place is entered here; its graph is then one of so many particles
            entry = "forward" if getattr(network, "_compiled_call_impl", None) is None else "_compiled_call_impl"
            forward = _in_chunks(getattr(network, entry), number, particles or number)
            stack.enter_context(replaced(network, entry, _within(lambda: timing("network"), forward)))
        for module in _modules(pipe, DECODERS):
            decode = _rows_in_chunks(module.decode, number, decodes or number)
            stack.enter_context(replaced(module, "decode", _within(lambda: lowering("decode_batch_size"), decode)))
        yield


def _modules(pipe: Any, names: tuple[str, ...]) -> list[Any]:
    found = [getattr(pipe, name, None) for name in names]
    return [module for module in found if isinstance(module, torch.nn.Module)]


def _within(context: Callable[[], AbstractContextManager[None]], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs within a context."""

    @wraps(function)
    def within(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return within


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
        if size >= number or rows < number or rows % number:
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


def _rows_in_chunks(decode: Callable[..., Any], number: int, size: int) -> Callable[..., Any]:
    """Return a decoder that decodes some particles at a time where it is given one row of each."""
    in_chunks = _in_chunks(decode, number, size)

    @wraps(decode)
    def decoding(z: Any, *args: Any, **kwargs: Any) -> Any:
        frames_as_rows = len(z) != number or "num_frames" in kwargs
        return decode(z, *args, **kwargs) if frames_as_rows else in_chunks(z, *args, **kwargs)

    return decoding


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
