"""Packages that not everybody has installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needing_matplotlib() -> Iterator[None]:
    """Say, of an import within a block, how to install matplotlib if it is missing.

    Raises:
        ImportError: if it is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise ImportError(
            'plot: expected matplotlib, which is not installed: pip install "glassflows[plot]"'
        ) from error
