"""GLASSFlowMatchScheduler: GLASSScheduler for pipelines that accept one native class only."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from .scheduler import GLASSScheduler


class GLASSFlowMatchScheduler(GLASSScheduler, FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """A `GLASSScheduler` for pipelines that ask for `FlowMatchEulerDiscreteScheduler` by isinstance.

    These are Bria, EasyAnimate and LongCat-Audio; others need `GLASSScheduler` itself.
    """

    def _wrap(self, scheduler: Any) -> None:
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"scheduler: GLASSFlowMatchScheduler expects a FlowMatchEulerDiscreteScheduler, got "
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
