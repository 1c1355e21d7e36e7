"""Where a run is between two steps, and whether the host has touched its latents since.

A host is handed latents by each step and hands them back to the next. It may edit them in between:
blend them with a mask, write into them, round them. Its edits are carried into the state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..flow.solver import Block
from ..flow.state import InnerState, may_be_overwritten, moved
from .calls import Call

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


@dataclass(frozen=True)
class Departure:
    """A boundary that excursions leave from, and to which the chain comes back.

    Args:
        call: The call at the boundary.
        state: The state there.
        sample: The latents there, as the host holds them.
        denoised: ẑ there.
        left: Number of excursions that have left.
    """

    call: Call
    state: InnerState
    sample: Tensor
    denoised: Tensor
    left: int = 0

    @property
    def excursion(self) -> Block:
        """The transition to data that excursions take."""
        return self.call.excursions.block  # type: ignore[union-attr]

    @property
    def has_another(self) -> bool:
        """Whether an excursion has not left yet."""
        return self.left < self.call.excursions.number  # type: ignore[union-attr]

    def leaving(self) -> Departure:
        """Return the boundary when one more excursion has left."""
        return replace(self, left=self.left + 1)


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Args:
        calls: All of its network calls.
        index: The call that is due.
        state: The state of its transition; None after the last step.
        returned: Our copy of what the host was handed last; None before the first step and after
            the last.
        departure: The boundary that an excursion under way has left from; None on the chain.
    """

    calls: list[Call]
    index: int
    state: InnerState | None
    returned: Tensor | None
    departure: Departure | None = None

    @property
    def has_ended(self) -> bool:
        """Whether no call is due."""
        return self.index == len(self.calls)

    @property
    def is_at_last_call(self) -> bool:
        """Whether the call that is due is the last."""
        return self.index + 1 == len(self.calls)

    @property
    def call(self) -> Call:
        """The call that is due."""
        return self.calls[self.index]

    def state_at(self, sample: Tensor) -> InnerState:
        """Return the state of the call that is due, moved by what the host did to its latents.

        Raises:
            ValueError: if the latents have another shape than those the host was handed.
        """
        state: InnerState = self.state  # type: ignore[assignment]  # the run has not ended
        if self.returned is None:
            return state
        if sample.shape != self.returned.shape:
            raise ValueError(
                f"step: expected a sample of shape {tuple(self.returned.shape)}, got "
                f"{tuple(sample.shape)}: pipelines that drop rows or frames within a run are not "
                "supported"
            )
        if _is_handed_back(sample, self.returned):
            return state
        step = self.call.block.steps[self.call.i]
        return moved(step, state, sample.float(), self.returned.float())

    def advanced(
        self,
        state: InnerState,
        handed_out: Tensor,
        overwrite: bool,
        departure: Departure | None = None,
    ) -> Progress:
        """Return where the run is after a step.

        Args:
            state: The state of the next call.
            handed_out: What the host is handed.
            overwrite: Whether the copy of what it was handed before may be written over.
            departure: The boundary that an excursion under way has left from.
        """
        buffer = self.returned if overwrite else None
        returned = _copied(handed_out, buffer)
        return Progress(self.calls, self.index + 1, state, returned, departure)

    def released(self) -> Progress:
        """Return where the run is without its tensors."""
        return replace(self, state=None, returned=None, departure=None)


def _copied(x: Tensor, buffer: Tensor | None) -> Tensor:
    """Return a copy of x, in a buffer of ours where that may be overwritten."""
    if buffer is None or x.requires_grad or not may_be_overwritten(buffer, x):
        return x.clone()
    return buffer.copy_(x)


def _is_handed_back(sample: Tensor, returned: Tensor) -> bool:
    """Return whether a sample is known to be what the host was handed, bit for bit.

    The values of an accelerator are not waited for. A gradient may take another way than the value.
    """
    on_cpu = sample.device.type == returned.device.type == "cpu"
    if not on_cpu or sample.dtype != returned.dtype:
        return False
    if sample.requires_grad or returned.requires_grad:
        return False
    bits = _BITS[sample.element_size()]
    same = np.equal(sample.view(bits).numpy(), returned.view(bits).numpy())
    return bool(same.all())
