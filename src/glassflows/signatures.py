"""Signatures that show what keyword arguments are passed on, for `help` and completion."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any


def passing_on(function: Callable[..., Any], *others: Callable[..., Any]) -> Signature:
    """Return the signature of a function with those of others among its keyword arguments.

    Args:
        function: Passes keyword arguments on, `**kwargs`.
        others: What takes them.
    """
    own = list(inspect.signature(function).parameters.values())
    named = {one.name: one for one in own if one.kind is not Parameter.VAR_KEYWORD}
    rest = [one for one in own if one.kind is Parameter.VAR_KEYWORD]
    for other in others:
        for name, one in inspect.signature(other).parameters.items():
            if name != "self" and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
                named.setdefault(name, one.replace(kind=Parameter.KEYWORD_ONLY))
    return Signature([*named.values(), *rest])
