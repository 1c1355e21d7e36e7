"""Warnings at the line of a user that called the library.

Every storey may give them but those of mathematics, which have nobody to warn.
"""

from __future__ import annotations

import inspect
import warnings

_LIBRARY = __name__.split(".")[0]
_STEERER = f"{_LIBRARY}.steering.steerer"


def warn(message: str) -> None:
    """Warn at the line that called a steerer, or else at the first one outside the library.

    Between that line and this function are the library, a pipeline, and the library again.
    """
    names: list[str] = []  # of the modules on the way out
    frame = inspect.currentframe()
    while frame is not None:
        names.append(frame.f_globals.get("__name__", ""))
        frame = frame.f_back
    outside = [i for i, name in enumerate(names) if name.split(".")[0] != _LIBRARY]
    calls = [i for i in outside if i and names[i - 1] == _STEERER]
    warnings.warn(message, stacklevel=1 + next(iter(calls or outside), 0))
