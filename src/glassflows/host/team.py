"""Processes that share the work of a run: each has the whole population, and works on a part of it.

All of them run the same call on their own copy of the pipeline. Where particles are worked on, by
a network, a decoder or a reward, each process does so for its share, and all exchange what came
out. Everything else each does for itself, alike: so states never travel, and every process ends
with the same result as one process alone.

Such a place is a *meeting*. A process that fails goes to the next one and tells its reason there,
and all end with it. Meetings take place on the CPU, by gloo, whatever the processes compute on.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL.Image import Image
from torch import Tensor

Distributed = Literal["auto"] | bool

TIMEOUT = timedelta(minutes=30)
"""How long processes wait for the slowest at a meeting."""

PATIENCE = timedelta(minutes=1)
"""How long a process waits for the others to begin a call before it says so."""

_START = "the start"


class ProcessFailed(RuntimeError):
    """Another process of the run failed, is gone, or is somewhere else in it."""


class _Word(NamedTuple):
    """What a process says at a meeting.

    Args:
        place: Where in the run it is.
        failure: Why it cannot go on; None if it can.
        content: What it brings, pickled, its tensors left out.
        shapes: Shape and dtype of each of these, and whether it is on the CPU.
    """

    place: str
    failure: str | None
    content: bytes = b""
    shapes: tuple[tuple[torch.Size, torch.dtype, bool], ...] = ()

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(_padded(shape.numel() * dtype.itemsize) for shape, dtype, _ in self.shapes)


class Team:
    """The processes of a run, of which this is one.

    Args:
        group: A gloo group of them; None for this process alone.

    Attributes:
        rank: The number of this process.
        size: The number of processes.
        received: Bytes of tensors that this process has received of others.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.received = 0
        self._over = False

    def share(self, number: int, rank: int | None = None) -> slice:
        """Return the places of `number` particles that a process works on, this one's for None."""
        rank = self.rank if rank is None else rank
        return slice(number * rank // self.size, number * (rank + 1) // self.size)

    def shared(
        self,
        place: str,
        rows: Tensor,
        work: Callable[[Tensor, int], Any],
        device: torch.device | str | None = None,
    ) -> list[Any]:
        """Return what work on the rows of a tensor yields, in order, a part of each process.

        Args:
            place: Where in the run this is.
            rows: A row for each particle.
            work: Is given some rows and the number of the first of them.
            device: Where what it yields is put if it is not on the CPU; None for that of the rows.
        """
        part = self.share(len(rows))
        some = part.stop > part.start
        parts = self.meet(
            place, lambda: work(rows[part], part.start) if some else None, device or rows.device
        )
        return [one for one in parts if one is not None]

    def meet(
        self, place: str, work: Callable[[], Any], device: torch.device | str = "cpu"
    ) -> list[Any]:
        """Do this process's work, and return what that of each process yields.

        Args:
            place: Where in the run this is, the same on all.
            work: Returns this process's part: tensors, in whatever holds them.
            device: Where to put tensors of others that are not on their CPU.

        Raises:
            ProcessFailed: if another process failed, or is somewhere else.
        """
        if self.group is None:
            return [work()]
        token = _working.set(True)
        try:
            mine = work()
        finally:
            _working.reset(token)
        content, tensors = _without_tensors(mine)
        shapes = tuple((one.shape, one.dtype, one.device.type == "cpu") for one in tensors)
        own = _as_bytes(tensors)
        with _uninterrupted(), _telling_of(place):  # or others would wait for what never comes
            words = self._exchanged(_Word(place, None, content, shapes))
            buffers = self._sent(own, [word.size for word in words])
        return [
            mine if rank == self.rank else _with_tensors(word, buffer, device)
            for rank, (word, buffer) in enumerate(zip(words, buffers, strict=True))
        ]

    @contextmanager
    def together(self) -> Iterator[None]:
        """End on all processes if this one fails within a block."""
        if self.group is None or _teams.get() is self:
            yield
            return
        if not _lock.acquire(blocking=False):
            raise RuntimeError(
                "distributed: another thread of this process is in a call that it shares with "
                "other processes: make one after the other, or pass distributed=False"
            )
        self._over = False
        token = _teams.set(self)
        try:
            yield
            self.meet("the end", lambda: None)
        except BaseException as error:
            if not self._over:  # the others do not know
                with _uninterrupted():
                    why = f"{type(error).__name__}: {error}"
                    self._exchanged(_Word("a failure", why), quiet=True)
            raise
        finally:
            _teams.reset(token)
            _lock.release()

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Check that all processes are about to do the same.

        Raises:
            ValueError: with the names of the facts that differ.
        """
        if self.group is None:
            return
        own = {name: _digest(value) for name, value in facts.items()}
        for rank, other in enumerate(self.meet(_START, lambda: own)):
            names = [name for name in own.keys() | other.keys() if own.get(name) != other.get(name)]
            if names:
                raise ValueError(
                    f"distributed: expected the same call on all {self.size} processes, which "
                    f"share its particles, got another on process {rank} than on {self.rank}: "
                    f"{', '.join(sorted(names))}. Make the same call everywhere, or pass "
                    "distributed=False for a call of each process's own"
                )

    def share_default_generators(self, device: torch.device) -> None:
        """Draw from now on from torch's default generators as process 0 does."""
        if self.group is None:
            return
        states = [torch.get_rng_state()]
        module = getattr(torch, device.type, None)
        if device.type != "cpu" and module is not None:
            states.append(module.get_rng_state(device))
        states = self.meet(_START, lambda: states)[0]
        torch.set_rng_state(states[0])
        if len(states) > 1:
            module.set_rng_state(states[1], device)  # type: ignore[union-attr]

    def _exchanged(self, word: _Word, quiet: bool = False) -> list[_Word]:
        """Return the words of all processes, if all of them go on."""
        words: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(words, word, group=self.group)
        except RuntimeError as error:
            self._over = True
            if quiet:
                return []
            raise ProcessFailed(
                f"distributed: another process of the run is gone, or did not come to {word.place} "
                f"within {TIMEOUT}: {error}"
            ) from error
        failures = [
            f"process {rank} failed: {one.failure}"
            for rank, one in enumerate(words)
            if one.failure is not None
        ]
        if failures:
            self._over = True
            if not quiet:
                raise ProcessFailed(f"distributed: {'; '.join(failures)}")
        elif len(places := {one.place for one in words}) > 1:
            self._over = True
            raise ProcessFailed(
                f"distributed: expected all processes at {word.place}, got some at "
                f"{', '.join(sorted(places - {word.place}))}: callbacks and rewards have to do the "
                "same on each"
            )
        return words

    def _sent(self, own: Tensor, sizes: list[int]) -> list[Tensor]:
        """Return the bytes of all processes."""
        buffers = [
            own if rank == self.rank else torch.empty(size, dtype=torch.uint8, device="cpu")
            for rank, size in enumerate(sizes)
        ]
        try:
            works = [
                dist.broadcast(buffer, rank, group=self.group, async_op=True)
                for rank, buffer in enumerate(buffers)
                if len(buffer)
            ]
            for work in works:
                work.wait()  # type: ignore[union-attr]
        except RuntimeError as error:
            self._over = True
            raise ProcessFailed(
                f"distributed: another process is gone, or the exchange failed: {error}"
            ) from error
        self.received += sum(sizes) - sizes[self.rank]
        return buffers


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait for the end of a block; only the main thread is interrupted by it."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def _telling_of(place: str) -> Iterator[None]:
    """Say at the start of a call, within a block that takes long, that others are waited for."""
    if place != _START:
        yield
        return
    seconds = PATIENCE.total_seconds()
    timer = threading.Timer(
        seconds,
        _logger.warning,
        [
            "distributed: this process has waited for %g s for others to make the call whose "
            "particles all share; it waits up to %s. If this one alone is to make it, pass "
            "distributed=False.",
            seconds,
            TIMEOUT,
        ],
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


ALONE = Team()

_logger = logging.getLogger(__name__)

_lock = threading.Lock()
_working: ContextVar[bool] = ContextVar("glassflows_working", default=False)
_teams: ContextVar[Team] = ContextVar("glassflows_team", default=ALONE)
_groups: list[tuple[Any, dist.ProcessGroup]] = []  # the default group, and what was made for it


def team_of(distributed: Distributed) -> Team:
    """Return the processes that share a call; this one alone where there is no process group.

    Args:
        distributed: "auto" for all of `torch.distributed`'s, if it is initialised; True to insist
            on that; False for this process alone.

    Raises:
        ValueError: if it is none of these, or True without a process group.
    """
    if not (distributed == "auto" or isinstance(distributed, bool)):
        raise ValueError(f'distributed: expected "auto", True or False, got {distributed!r}')
    initialised = dist.is_available() and dist.is_initialized()
    if distributed is True and not initialised:
        raise ValueError(
            "distributed: expected an initialised process group, got none: start the script by "
            "`accelerate launch` or `torchrun`, and make an accelerate.PartialState() first"
        )
    if not (distributed and initialised) or dist.get_world_size() == 1:
        return ALONE
    if _working.get():  # what a reward calls is its own process's
        return ALONE
    inside = _teams.get()
    return Team(_control_group()) if inside is ALONE else inside


def _control_group() -> dist.ProcessGroup:
    """Return a gloo group of all processes, made once for each default group."""
    default = dist.group.WORLD
    if not _groups or _groups[0][0] is not default:
        made: Any = dist.new_group(backend="gloo", timeout=TIMEOUT)
        _groups[:] = [(default, made)]
    return _groups[0][1]


# ---- tensors and bytes ---------------------------------------------------------------------------


def _padded(size: int) -> int:
    """Return a number of bytes after which any number may begin."""
    return -(-size // 16) * 16


def _without_tensors(value: Any) -> tuple[bytes, list[Tensor]]:
    """Return a value pickled, and its tensors, which are left out."""
    tensors: list[Tensor] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> int | None:
            if not isinstance(obj, Tensor):
                return None
            tensors.append(obj.detach())
            return len(tensors) - 1

    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue(), tensors


def _with_tensors(word: _Word, buffer: Tensor, device: torch.device | str) -> Any:
    """Return a value of another process."""
    tensors, start = [], 0
    for shape, dtype, on_cpu in word.shapes:
        size = shape.numel() * dtype.itemsize
        one = buffer[start : start + size].view(dtype).view(shape)
        tensors.append(one if on_cpu else one.to(device))
        start += _padded(size)

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: int) -> Tensor:
            return tensors[pid]

    return Unpickler(io.BytesIO(word.content)).load()


def _as_bytes(tensors: list[Tensor]) -> Tensor:
    """Return tensors as bytes on the CPU, each padded."""
    parts = []
    for one in tensors:
        part = one.cpu().contiguous().reshape(-1).view(torch.uint8)
        parts += [part, part.new_zeros(_padded(len(part)) - len(part))]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device="cpu")


def _digest(value: Any) -> str:
    """Return a hash of what a call is given; of objects that are no data it tells the type."""
    if is_dataclass(value) and not isinstance(value, type):
        value = (
            type(value).__name__,
            _digest({one.name: getattr(value, one.name) for one in fields(value)}),
        )
    elif isinstance(value, Mapping):
        value = sorted((str(name), _digest(one)) for name, one in value.items())
    elif isinstance(value, (list, tuple)):
        value = [_digest(one) for one in value]
    elif isinstance(value, torch.Generator):
        value = value.device.type, _digest(value.get_state())
    elif isinstance(value, Tensor):
        value = value.shape, value.dtype, _hash(_as_bytes([value.detach()]).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        value = value.shape, value.dtype, _hash(value.tobytes())
    elif isinstance(value, Image):
        value = value.mode, value.size, _hash(value.tobytes())
    elif not (value is None or isinstance(value, (bool, int, float, str, bytes))):
        value = getattr(value, "__qualname__", type(value).__name__)
    return _hash(repr(value).encode())


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
