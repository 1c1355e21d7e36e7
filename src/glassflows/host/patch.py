"""What a run replaces on a pipeline and its components, and how it is put back.

A *run* is *current* in the thread that calls its pipeline, except while a hook of that run, or a
function of the user's, is running. A *stand-in* takes the place of a method for as long as some run
replaces it: it calls the replacement of the current run, and the method itself for everybody else.
Runs that share a network therefore never see each other, and may end in any order.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import update_wrapper
from types import MethodType
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

_current: ContextVar[Hashable | None] = ContextVar("glassflows_run", default=None)
_lock = threading.RLock()
_MISSING = object()

Method = Callable[..., Any]


@contextmanager
def current(run: Hashable | None) -> Iterator[None]:
    """Make a run the current one of this thread, or none, within a block."""
    token = _current.set(run)
    try:
        yield
    finally:
        _current.reset(token)


def is_current(run: Hashable) -> bool:
    """Return whether a run is the current one of this thread."""
    return _current.get() is run


def apart(function: Any) -> Any:
    """Return a function of the user's in which no run is current: what it calls is as if alone.

    Args:
        function: A function, one of diffusers' objects for callbacks, or None.
    """
    if isinstance(function, (PipelineCallback, MultiPipelineCallbacks)):
        return _CallbacksApart(function)
    if function is None:
        return None

    def calling(*args: Any, **kwargs: Any) -> Any:
        with current(None):
            return function(*args, **kwargs)

    return calling


class _CallbacksApart(MultiPipelineCallbacks):
    """Callbacks that pipelines know by their class."""

    def __init__(self, inner: PipelineCallback | MultiPipelineCallbacks) -> None:
        self.inner = inner

    @property
    def tensor_inputs(self) -> list[str]:
        return self.inner.tensor_inputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with current(None):
            return self.inner(*args, **kwargs)


class _StandIn:
    """Takes the place of a method of an object.

    Args:
        owner: The object.
        name: Name of the method.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.own = vars(owner).get(name, _MISSING)  # missing where the method is that of the class
        self.method: Method = getattr(owner, name)
        self.owner_id = id(owner)
        self.replacements: dict[Hashable, Method] = {}
        self.for_others: Method = self.method
        update_wrapper(self, self.method, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = _current.get()
        method = None if run is None else self.replacements.get(run)
        return (method or self.for_others)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return the method of the owner's copy: no run replaces anything on a copy."""
        if self.own is not _MISSING:
            return copy.deepcopy(self.own, memo)
        function = getattr(self.method, "__func__", None)
        owner = memo.get(self.owner_id)
        return self.method if function is None or owner is None else MethodType(function, owner)


@contextmanager
def replaced(
    owner: Any,
    name: str,
    run: Hashable,
    make: Callable[[Method], Method],
    for_others: Method | None = None,
) -> Iterator[None]:
    """Let a run find another method on an object, within a block.

    Offloading takes its hooks off a network and puts them on anew within a call: what it has put
    there since is left there.

    Args:
        owner: The object.
        name: Name of the method.
        run: The run.
        make: Returns the replacement of a method.
        for_others: What everybody else finds; None for the method itself. The owner must then be
            in no other run.
    """
    with _lock:
        stand_in = vars(owner).get(name)
        if not isinstance(stand_in, _StandIn):
            stand_in = _StandIn(owner, name)
            vars(owner)[name] = stand_in
        stand_in.replacements[run] = make(stand_in.method)
        stand_in.for_others = for_others or stand_in.method
    try:
        yield
    finally:
        with _lock:
            del stand_in.replacements[run]
            if not stand_in.replacements and vars(owner).get(name) is stand_in:
                del vars(owner)[name]
                if stand_in.own is not _MISSING:
                    vars(owner)[name] = stand_in.own
