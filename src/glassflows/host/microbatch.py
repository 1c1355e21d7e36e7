"""Micro-batches: a pipeline's networks and its decoder see a few particles at a time.

A row of a network's batch is a particle under one of the guidance conditions; the rows of a
particle go together. The pipeline's own loop is left as it is: each of its calls of a network
becomes several, whose outputs are put together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

NETWORKS = (
    "transformer",
    "transformer_2",
    "unconditional_transformer",
    "unet",
    "controlnet",
    "prior",
)
DECODERS = ("vae", "movq", "vqvae", "vqgan")

_NOT_ROWS = ("img_ids", "txt_ids")
"""Positions, of which there may be as many as there are rows."""

Method = Callable[..., Any]


@dataclass(frozen=True)
class MicroBatches:
    """How many particles are worked on at a time; None for all of them.

    Args:
        network: Particles that a network sees, guidance rows with their own.
        decode: Latents decoded, on the way and by the pipeline at the end.
        reward: Samples scored.

    Raises:
        ValueError: if one of them is less than 1.
    """

    network: int | None = None
    decode: int | None = None
    reward: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                option = BATCH_SIZE_OPTIONS[name]
                raise ValueError(f"{option}: expected at least 1, got {value}")


BATCH_SIZE_OPTIONS = {
    "network": "particle_batch_size",
    "decode": "decode_batch_size",
    "reward": "reward_batch_size",
}
"""The fields of `MicroBatches` by their names as options of `FeynmanKacSteerer`."""


class MicroBatchTooLarge(torch.OutOfMemoryError):
    """Memory ran out, and a smaller micro-batch would have needed less."""


@contextmanager
def naming_batch_size(field: str) -> Iterator[None]:
    """Say of an out-of-memory error which field of `MicroBatches` to lower: the innermost one."""
    try:
        yield
    except MicroBatchTooLarge:
        raise
    except torch.OutOfMemoryError as error:
        raise MicroBatchTooLarge(
            f"{error} (lower {BATCH_SIZE_OPTIONS[field]} of FeynmanKacSteerer, which is {field} of "
            "MicroBatches)"
        ) from error


def modules(pipe: Any, names: tuple[str, ...]) -> list[torch.nn.Module]:
    """Return the components of a pipeline that have these names, each once."""
    found = [getattr(pipe, name, None) for name in names]
    return list({id(one): one for one in found if isinstance(one, torch.nn.Module)}.values())


def entry(network: torch.nn.Module) -> str:
    """Return the name of the method by which a network is called.

    A module that was compiled in place has one of its own; its graph is one of a micro-batch then.
    """
    compiled = getattr(network, "_compiled_call_impl", None) is not None
    return "_compiled_call_impl" if compiled else "forward"


def within(context: Callable[[], AbstractContextManager[None]], method: Method) -> Method:
    """Return a method that runs within a context."""

    @wraps(method)
    def in_context(*args: Any, **kwargs: Any) -> Any:
        with context():
            return method(*args, **kwargs)

    return in_context


def in_micro_batches(forward: Method, number: int, size: int | None) -> Method:
    """Return a forward that calls another one for some particles at a time.

    Args:
        forward: The other one.
        number: Number of particles, of all prompts together.
        size: Particles at a time; None for all.
    """
    if size is None or size >= number:
        return forward

    @wraps(forward)
    def in_parts(*args: Any, **kwargs: Any) -> Any:
        batch = next((value for value in (*args, *kwargs.values()) if _is_batch(value)), ())
        rows, listed = len(batch), isinstance(batch, list)
        if rows < number or rows % number:
            return forward(*args, **kwargs)
        order = torch.arange(rows).view(-1, number)  # a row of it for each guidance condition
        parts = [part.flatten() for part in order.split(size, 1)]
        outputs = []
        for part in parts:
            some = [_take(value, part, rows, listed) for value in args]
            named = {
                name: value if name in _NOT_ROWS else _take(value, part, rows, listed)
                for name, value in kwargs.items()
            }
            outputs.append(forward(*some, **named))
        return _joined(outputs, torch.cat(parts).argsort(), listed)

    return in_parts


def decoding_in_micro_batches(decode: Method, number: int, size: int | None) -> Method:
    """Return a decoder that decodes some particles at a time, given one row of each.

    A decoder that is given frames as rows gets them as they are.
    """
    in_parts = in_micro_batches(decode, number, size)

    @wraps(decode)
    def decoding(z: Any, *args: Any, **kwargs: Any) -> Any:
        frames_as_rows = len(z) != number or "num_frames" in kwargs
        return (decode if frames_as_rows else in_parts)(z, *args, **kwargs)

    return decoding


def _is_batch(value: Any) -> bool:
    """Return whether an argument is the network's input: a tensor, or a list of one per row."""
    tensors = isinstance(value, list) and len(value) > 0 and isinstance(value[0], Tensor)
    return tensors or (isinstance(value, Tensor) and value.ndim > 1)


def _take(value: Any, chosen: Tensor, rows: int, listed: bool) -> Any:
    """Return some rows of an argument that has them, in whatever it is nested; others as they are.

    Args:
        value: The argument.
        chosen: Indices of rows.
        rows: Number of rows of the batch.
        listed: Whether batches are lists of one tensor per row (Z-Image).
    """
    if isinstance(value, Tensor):
        has_rows = value.ndim > 0 and len(value) == rows
        return value[chosen.to(value.device)] if has_rows else value
    if isinstance(value, dict):
        return {name: _take(one, chosen, rows, listed) for name, one in value.items()}
    if listed and isinstance(value, list) and len(value) == rows:
        return [value[i] for i in chosen.tolist()]
    if isinstance(value, (list, tuple)):
        return type(value)(_take(one, chosen, rows, listed) for one in value)
    return value


def _joined(outputs: list[Any], back: Tensor, listed: bool) -> Any:
    """Return the outputs of the parts as one, in the order of the rows."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)[back.to(first.device)]
    if isinstance(first, dict):  # diffusers' output classes are dictionaries
        joined = {name: _joined([out[name] for out in outputs], back, listed) for name in first}
        return type(first)(**joined)
    if listed and isinstance(first, list):
        everything = [one for out in outputs for one in out]
        return [everything[i] for i in back.tolist()]
    if isinstance(first, (list, tuple)):
        columns = zip(*outputs, strict=True)
        return type(first)(_joined(list(column), back, listed) for column in columns)
    return first
