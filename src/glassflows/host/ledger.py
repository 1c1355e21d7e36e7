"""The ledger of a call: what was evaluated how often, and how long it took."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass(repr=False)
class Ledger:
    """What a steered call cost. Ledgers of the same counts are equal, whatever time they took.

    Args:
        network_calls: Evaluations of the denoiser, one per living particle and step (two network
            passes each under guidance).
        decodes: Latents decoded for the reward, one per particle and scoring, or per end of an
            excursion; the pipeline's own last ones are not counted.
        reward_calls: Samples scored.
        seconds: Wall-clock seconds: "network", "decode", "reward", "gradient" (backwards alone),
            "total"; the rest of the total is the pipeline's own (text encoders, its last decoding).
            An accelerator is waited for at either end of each, so that none is charged with what
            another queued.
        gradients: Samples whose reward was differentiated, through the decoder.
        received: Bytes of tensors that came from other processes, which share the particles.
    """

    network_calls: int = 0
    decodes: int = 0
    reward_calls: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float), compare=False)
    gradients: int = 0
    received: int = field(default=0, compare=False)

    def __str__(self) -> str:
        counts = (
            f"{self.network_calls} network calls, {self.decodes} decodes, "
            f"{self.reward_calls} reward calls"
        )
        if self.gradients:
            counts += f", {self.gradients} gradients"
        if self.received:
            counts += f", {self.received / 1e6:.3g} MB from other processes"
        times = dict(self.seconds)
        total = times.pop("total", None)
        if total is None:
            return counts
        parts = ", ".join(f"{name} {time:.3g}" for name, time in times.items())
        return f"{counts}; {total:.3g} s" + (f" ({parts})" if parts else "")

    def __repr__(self) -> str:
        return f"Ledger({self})"

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Add the time of a block to `seconds[what]`."""
        start = _now()
        try:
            yield
        finally:
            self.seconds[what] += _now() - start


def _now() -> float:
    """Return the time when everything queued so far is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
