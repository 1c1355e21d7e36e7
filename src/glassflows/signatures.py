"""What `help`, completion and `repr` show of options, and what objects can be called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import fields
from inspect import Parameter, Signature
from typing import Any


def passing_on(
    function: Callable[..., Any],
    other: Callable[..., Any],
    but: Collection[str] = (),
    *,
    keep: bool = False,
) -> Signature:
    """Return the signature of a function with the arguments of another in place of its `**kwargs`.

    Args:
        function: Passes keyword arguments on.
        other: What takes them.
        but: Names of those that it does not pass on.
        keep: Whether it takes yet others, so that `**kwargs` stays.
    """
    own, more = (inspect.signature(one).parameters for one in (function, other))
    shown = {name: one for name, one in own.items() if one.kind is not Parameter.VAR_KEYWORD}
    for name, one in more.items():
        if name not in ("self", *but) and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
            shown.setdefault(name, one.replace(kind=Parameter.KEYWORD_ONLY))
    rest = [one for one in own.values() if keep and one.kind is Parameter.VAR_KEYWORD]
    return Signature([*shown.values(), *rest])


def call_if_there(owner: Any, name: str, *arguments: Any) -> None:
    """Call a method of an object, if it has one of that name that takes these arguments."""
    method: Any = getattr(owner, name, None)
    try:
        inspect.signature(method).bind(*arguments)
    except (TypeError, ValueError):  # it has none, or one for something else
        return
    method(*arguments)


def described(options: Any) -> str:
    """Return the look of a dataclass, with the options that are not as usual."""
    told = [
        f"{field.name}={getattr(value, '__name__', None) or repr(value)}"
        for field, value in ((field, getattr(options, field.name)) for field in fields(options))
        if value != field.default
    ]
    return f"{type(options).__name__}({', '.join(told)})"
