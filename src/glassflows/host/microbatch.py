"""Micro-batches: a pipeline's networks and its decoder see a few particles at a time.

A row of a network's batch is a particle under one of the guidance conditions; the rows of a
particle go together. The pipeline's own loop is left as it is: each of its calls of a network
becomes several, whose outputs are put together. Particles that rest are in none of them, and their
outputs are copies of those of particles that live, so that the loop finds numbers of the right size
everywhere. Where several processes share a run, each calls its networks for its own share of those
that live, and gets the outputs of the others from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .network_rows import (
    Along,
    Declared,
    Layout,
    Named,
    OneEach,
    Refused,
    Shared,
    declared_by_decoder,
    declared_by_network,
    state_kept,
)
from .team import ALONE, Team

NETWORKS = (
    "transformer",
    "transformer_2",
    "unconditional_transformer",
    "unet",
    "controlnet",
    "prior",
)
DECODERS = ("vae", "movq", "vqvae", "vqgan")

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
            option = BATCH_SIZE_OPTIONS[name]
            if value is None:
                continue
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise ValueError(
                    f"{option}: expected a whole number of at least 1, or None for all at once, "
                    f"got {value!r}"
                )
            if value < 1:
                raise ValueError(f"{option}: expected at least 1, got {value}")
            object.__setattr__(self, name, int(value))  # of numpy's


BATCH_SIZE_OPTIONS = {
    "network": "particle_batch_size",
    "decode": "decode_batch_size",
    "reward": "reward_batch_size",
}
"""The fields of `MicroBatches` by their names as options of `FeynmanKacSteerer`."""


@dataclass
class Living:
    """Which particles of a run are worked on, from now on, and by which processes.

    Args:
        number: Particles of the run, of all prompts together.
        shrinks: Whether some will rest later: what cannot be called without them is refused at
            once.
        chosen: Those that live, increasing, int64; None for all.
        num_frames: Frames of each, where a network may be given them as rows.
        team: The processes, each of which works on its share of them.
    """

    number: int
    shrinks: bool = False
    chosen: Tensor | None = None
    num_frames: int = 1
    team: Team = ALONE

    @property
    def particles(self) -> Tensor:
        """The particles that live."""
        return torch.arange(self.number) if self.chosen is None else self.chosen

    def places(self) -> Tensor:
        """Return the place among the living of what stands for each particle, shape (number,).

        A particle that lives stands for itself, and the living stand in turn for those that rest.
        """
        living = self.particles
        places = torch.full((self.number,), -1)
        places[living] = torch.arange(len(living))
        places[places < 0] = torch.arange(self.number - len(living)) % len(living)
        return places


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


def check_no_state(pipe: Any, given: Mapping[str, Any], size: int | None, living: Living) -> None:
    """Refuse some particles at a time where networks keep something of all rows between calls.

    Args:
        pipe: The pipeline.
        given: The keyword arguments of its call.
        size: Particles that a network sees at a time; None for all.
        living: The particles of the run.

    Raises:
        ValueError: with the reason.
    """
    in_batches = _is_less(size, living.number)
    alone = living.team.size == 1
    if not (in_batches or living.shrinks) and alone:
        return
    if state := state_kept(pipe, given):
        if not alone:
            raise ValueError(
                f"distributed: expected False for {type(pipe).__name__}, whose network keeps from "
                f"call to call {state}: processes cannot share its particles"
            )
        option = BATCH_SIZE_OPTIONS["network"] if in_batches else _WIDTHS
        expected = f"None (or at least {living.number})" if in_batches else "as many to the end"
        got = size if in_batches else "fewer"
        raise ValueError(
            f"{option}: expected {expected} for {type(pipe).__name__}, whose network keeps from "
            f"call to call {state}, got {got}: leave {option} out"
        )


_WIDTHS = "widths"
"""The option of strategies by which particles rest, as messages name it."""


def _is_less(size: int | None, number: int) -> bool:
    """Return whether a batch size, None for all, asks for several micro-batches."""
    return size is not None and size < number


def networks_in_micro_batches(
    network: torch.nn.Module,
    forward: Method,
    number: int,
    size: int | None,
    living: Living | None = None,
    of_frames: bool = False,
) -> Method:
    """Return a forward that calls that of a network for some particles at a time.

    Args:
        network: The network.
        forward: Its forward.
        number: Number of particles, of all prompts together.
        size: Particles at a time; None for all.
        living: The particles of the run, as they are when the network is called; None for all.
        of_frames: Whether the network is given the frames of each particle as rows.
    """
    if living is None and not _is_less(size, number):
        return forward
    declared = declared_by_network(network)
    return _in_parts(declared, forward, size, living or Living(number), of_frames)


def decoding_in_micro_batches(
    module: torch.nn.Module,
    decode: Method,
    number: int,
    size: int | None,
    living: Living | None = None,
) -> Method:
    """Return a decoder that decodes some particles at a time, given one row of each.

    A decoder that is given frames as rows gets them as they are.

    Args:
        module: The autoencoder.
        decode: Its `decode`.
        number: Number of particles, of all prompts together.
        size: Particles at a time; None for all.
        living: The particles of the run, as they are when it decodes; None for all.
    """
    if living is None and not _is_less(size, number):
        return decode
    in_parts = _in_parts(declared_by_decoder(module), decode, size, living or Living(number))

    @wraps(decode)
    def decoding(*args: Any, **kwargs: Any) -> Any:
        latents = next(iter((*args, *kwargs.values())))
        frames_as_rows = len(latents) != number or "num_frames" in kwargs
        return (decode if frames_as_rows else in_parts)(*args, **kwargs)

    return decoding


def of_living(method: Method, living: Living) -> Method:
    """Return a method that is given the rows of living particles alone.

    Its first argument has a row for each particle, and so has the tensor that it returns.

    Args:
        method: The method.
        living: The particles of the run, as they are when it is called.
    """

    @wraps(method)
    def of_some(rows: Tensor, *args: Any, **kwargs: Any) -> Any:
        if living.chosen is None or len(rows) != living.number:
            return method(rows, *args, **kwargs)
        out = method(rows[living.chosen.to(rows.device)], *args, **kwargs)
        return out[living.places().to(out.device)]

    return of_some


def _in_parts(
    declared: Declared, forward: Method, size: int | None, living: Living, of_frames: bool = False
) -> Method:
    """Return a function that calls another one for some particles at a time."""
    number = living.number
    if not _is_less(size, number):  # then it is for those that rest, or for several processes
        field = _WIDTHS if living.team.size == 1 else "distributed"
        declared = replace(declared, field=field)

    @wraps(forward)
    def of_a_call(*args: Any, **kwargs: Any) -> Any:
        team = living.team
        in_parts = living.shrinks or living.chosen is not None or _is_less(size, number)
        if not in_parts and team.size == 1:
            return forward(*args, **kwargs)
        given = {**dict(declared.named(args)), **kwargs}
        rows = _number_of_rows(declared, given)
        each = living.num_frames if of_frames else 1
        if rows and (rows < number or rows % (number * each)):
            return forward(*args, **kwargs)
        _check_declared(declared, given, number, rows)
        particles = living.particles
        size_of_part = min(size or number, len(particles))
        if not rows or (size_of_part == number and team.size == 1):
            return forward(*args, **kwargs)
        order = torch.arange(rows).view(-1, number, each)  # by condition, particle and frame

        def called(share: Tensor) -> tuple[list[_Part], list[Any]]:
            """Call the network for some particles, as many at a time as are allowed."""
            chosen = order[:, share].split(size_of_part, 1)
            parts = [_Part(declared, part.flatten(), rows) for part in chosen]
            outputs = []
            for part in parts:
                some = {name: part.of_argument(name, value) for name, value in given.items()}
                positional = [some.pop(name) for name, _ in declared.named(args)]
                outputs.append(forward(*positional, **some))
            return parts, outputs

        def in_order(share: Tensor, first: int) -> Any:
            return _Whole(declared, *called(share)).in_order(order[:, share].flatten())

        if team.size == 1:
            whole = _Whole(declared, *called(particles))
        else:
            device = next((one.device for one in given.values() if isinstance(one, Tensor)), None)
            outputs = team.shared(declared.name, particles, in_order, device)
            shares = [particles[team.share(len(particles), rank)] for rank in range(team.size)]
            parts = [_Part(declared, order[:, one].flatten(), rows) for one in shares if len(one)]
            whole = _Whole(declared, parts, outputs)
        return whole.in_order(order[:, particles[living.places()]].flatten())

    return of_a_call


def _number_of_rows(declared: Declared, given: Mapping[str, Any]) -> int:
    """Return the rows of a call: those of the first argument that has some; 0 if none has."""
    in_order = [name for name in declared.positions if name in given]
    counts = (_length(given[name], declared.layout(name)) for name in (*in_order, *given))
    return next((count for count in counts if count), 0)


def _length(value: Any, layout: Layout | None) -> int:
    """Return the number of rows of an argument; 0 where it does not tell."""
    tensor = isinstance(value, Tensor) and value.ndim > 1
    if isinstance(layout, Along) and tensor and not layout.several:
        return value.shape[layout.axis]
    listed = isinstance(value, list) and len(value) > 0
    return len(value) if isinstance(layout, OneEach) and (tensor or listed) else 0


def _check_declared(declared: Declared, given: Mapping[Any, Any], number: int, rows: int) -> None:
    """Refuse arguments that are state, or not known, if by their size these may have rows."""
    for name, value in given.items():
        layout = declared.layout(name)
        if layout is None:
            _check_without_rows(declared, name, value, number, rows)
        elif isinstance(layout, Refused) and rows and _in_use(value):
            expected = f"no {name}, as {layout.reason}"
            raise UndeclaredRows(declared, f"a {type(value).__name__}", expected)
        elif isinstance(layout, Named) and isinstance(value, Mapping):
            _check_declared(declared, value, number, rows)


def _check_without_rows(declared: Declared, name: str, value: Any, number: int, rows: int) -> None:
    inside: Iterable[Any] = ()
    shape: tuple[int, ...] = ()
    if isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, (list, tuple)):
        inside, shape = value, (len(value),)
    elif isinstance(value, Tensor):
        shape = tuple(value.shape)
    first, *others = shape or (0,)
    if (first > 0 and first % number == 0) or {number, rows} & set(others):
        raise UndeclaredRows(declared, f"{name} of {shape}")
    for one in inside:
        _check_without_rows(declared, name, one, number, rows)


class UndeclaredRows(ValueError):
    """A network is called with what is not known to have rows or to have none.

    Args:
        declared: What is declared of the network.
        got: An argument or an output, and its size.
        expected: What it was expected to be.
    """

    def __init__(
        self, declared: Declared, got: str, expected: str = "an argument that is known to have rows"
    ) -> None:
        option = field = declared.field
        if field in BATCH_SIZE_OPTIONS:
            option = f"{BATCH_SIZE_OPTIONS[field]} ({field} of MicroBatches)"
        super().__init__(
            f"{option}: {declared.name} cannot be called for some particles at a time: expected "
            f"{expected}, got {got}: leave the option out"
        )


class _Part:
    """Some rows of a call.

    Args:
        declared: What is declared of the arguments.
        chosen: Indices of the rows.
        rows: Number of rows of the call.
    """

    def __init__(self, declared: Declared, chosen: Tensor, rows: int) -> None:
        self.declared = declared
        self.chosen = chosen
        self.rows = rows

    def of_argument(self, name: str, value: Any) -> Any:
        """Return these rows of an argument, or of an entry of a dictionary of such."""
        return self._of(name, value, self.declared.layout(name) or Shared())

    def _of(self, name: str, value: Any, layout: Layout) -> Any:
        if isinstance(layout, Named) and isinstance(value, dict):
            return {key: self.of_argument(key, one) for key, one in value.items()}
        if isinstance(layout, Along):
            return self._along(name, value, layout)
        if isinstance(layout, OneEach):
            return self._one_each(name, value, layout)
        return value

    def _along(self, name: str, value: Any, layout: Along) -> Any:
        if isinstance(value, dict):
            return {key: self._along(name, one, layout) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            inside = Along(max(layout.axis - 1, 0), layout.several)
            return type(value)(self._along(name, one, inside) for one in value)
        if not isinstance(value, Tensor) or value.ndim <= layout.axis:
            return value
        length = value.shape[layout.axis]
        if length == 1 < self.rows:
            return value  # for all rows
        entries, rest = divmod(length, self.rows)
        if rest or entries == 0 or (entries > 1 and not layout.several):
            raise self._wrong(name, length)
        return value.index_select(layout.axis, _entries(self.chosen, entries).to(value.device))

    def _one_each(self, name: str, value: Any, layout: OneEach) -> Any:
        if isinstance(value, Tensor):
            return self._along(name, value, Along())
        if not isinstance(value, list):
            return value
        if len(value) == self.rows:
            return [value[i] for i in self.chosen.tolist()]
        if layout.or_for_all:
            return value
        raise self._wrong(name, len(value))

    def _wrong(self, name: str, length: int) -> UndeclaredRows:
        expected = f"{name} to have its {self.rows} rows, or one for all"
        return UndeclaredRows(self.declared, str(length), expected)


class _Whole:
    """The parts of a call, and their outputs.

    Args:
        declared: What is declared of the output.
        parts: The parts.
        outputs: The output of each.
    """

    def __init__(self, declared: Declared, parts: list[_Part], outputs: list[Any]) -> None:
        self.declared = declared
        self.outputs = outputs
        self.rows = parts[0].rows
        self.sizes = [len(part.chosen) for part in parts]
        self._chosen = torch.cat([part.chosen for part in parts])

    def in_order(self, rows: Tensor) -> Any:
        """Return the outputs of rows of the call, each of which is in some part."""
        places = torch.zeros(self.rows, dtype=torch.long, device=self._chosen.device)
        places[self._chosen] = torch.arange(len(self._chosen), device=places.device)
        self.back = places[rows]
        return self._joined(self.outputs, self.declared.output)

    def _joined(self, outputs: list[Any], layout: Layout) -> Any:
        first = outputs[0]
        if isinstance(first, Tensor):
            return self._tensor(outputs, isinstance(layout, Along) and layout.several)
        if isinstance(first, dict):  # diffusers' output classes are dictionaries
            entries = {name: self._joined([out[name] for out in outputs], layout) for name in first}
            return entries if type(first) is dict else type(first)(**entries)
        if isinstance(first, list) and isinstance(layout, OneEach):
            everything = [one for out in outputs for one in out]
            return [everything[i] for i in self.back.tolist()]
        if isinstance(first, (list, tuple)):
            columns = zip(*outputs, strict=True)
            return type(first)(self._joined(list(column), layout) for column in columns)
        if first is None or isinstance(first, (bool, int, float, str)):
            return first
        raise self._wrong(f"a {type(first).__name__}, which may hold what is of all rows")

    def _tensor(self, outputs: list[Tensor], several: bool) -> Tensor:
        if outputs[0].ndim == 0:  # a mean over the rows, such as a loss
            weights = torch.tensor(self.sizes).to(outputs[0]) / sum(self.sizes)
            return (torch.stack(outputs) * weights).sum()
        entries, rest = divmod(len(outputs[0]), self.sizes[0])
        lengths = [len(one) for one in outputs]
        as_rows = lengths == [size * entries for size in self.sizes]
        if rest or not as_rows or (entries > 1 and not several):
            raise self._wrong(f"{lengths[0]} rows for {self.sizes[0]}")
        return torch.cat(outputs)[_entries(self.back, entries).to(outputs[0].device)]

    def _wrong(self, got: str) -> UndeclaredRows:
        return UndeclaredRows(self.declared, got, "outputs with a row for each row")


def _entries(rows: Tensor, entries: int) -> Tensor:
    """Return the indices of the entries of rows that have several each, one after the other."""
    return (rows[:, None] * entries + torch.arange(entries)).flatten()


def _in_use(value: Any) -> bool:
    """Return whether state is handed on: GLM-Image hands on a cache without a mode, unused."""
    layers = getattr(value, "caches", None)
    if isinstance(layers, list):
        return any(getattr(layer, "mode", "") is not None for layer in layers)
    return not (value is None or value is False or (isinstance(value, (list, dict)) and not value))
