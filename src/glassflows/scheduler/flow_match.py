"""GLASSFlowMatchScheduler: GLASSScheduler for pipelines that accept one native class only."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from .glass import GLASSScheduler
from .supported import UnsupportedScheduler


class GLASSFlowMatchScheduler(GLASSScheduler, FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """A `GLASSScheduler` that is a `FlowMatchEulerDiscreteScheduler` by isinstance.

    Bria, EasyAnimate and LongCat-Audio ask for that; other pipelines need `GLASSScheduler` itself.
    """

    def _wrap(self, scheduler: Any) -> None:
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise UnsupportedScheduler(
                "scheduler: GLASSFlowMatchScheduler expects a FlowMatchEulerDiscreteScheduler, got "
                f"{type(scheduler).__name__}: use GLASSScheduler"
            )
        super()._wrap(scheduler)

    @property
    def shift(self) -> float:
        """The native scheduler's shift."""
        return self._native.scheduler.shift

    def set_shift(self, shift: float) -> None:
        """Set the native scheduler's shift."""
        self._native.scheduler.set_shift(shift)
