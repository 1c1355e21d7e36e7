"""The network calls of a run: the native grid with the transitions laid over it, as host and mathematics name them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from .flow.noise import NoiseLevel
from .flow.solver import Block, Solver
from .flow.timetable import cut, timetable
from .flow.transition import Correlations, check_num_transitions
from .natives import Native

FirstTransition = Literal["ode", "posterior"]


class PlannedCall(NamedTuple):
    """A network call of a run: the i-th of transition k, which may draw noise at its first."""

    k: int
    block: Block
    i: int
    draws: bool


@dataclass(frozen=True)
class Transitions:
    """How the network calls of a run are split into transitions, and how these are sampled; see `GLASSScheduler`."""

    number: int
    correlation: Correlations
    first: FirstTransition
    solver: Solver

    def __post_init__(self) -> None:
        check_num_transitions(self.number)
        if self.first not in get_args(FirstTransition):
            raise ValueError(f"first_transition: expected one of {get_args(FirstTransition)}, got {self.first!r}")

    @property
    def draw_first(self) -> bool:
        """Whether the first transition draws noise, too."""
        return self.first == "posterior"

    @property
    def on_native_grid(self) -> bool:
        """Whether the calls are at the native scheduler's own timesteps."""
        return self.correlation == "ddpm" and self.solver.grid == "time"

    def lay(self, levels: Sequence[NoiseLevel], native: Native) -> list[Block]:
        """Lay them over a grid of noise levels."""
        return timetable(
            levels,
            self.number,
            schedule=native.schedule,
            correlation=self.correlation,
            solver=self.solver,
            draw_first=self.draw_first,
        )


class Plan:
    """What one `set_timesteps` decides.

    Args:
        native: The native scheduler; it computes the grid.
        transitions: What is laid over the grid.
        num_inference_steps: Number of network calls, where the host names it.
        device: Device of `timesteps`.
        given: What else the host gave the native scheduler: `sigmas`, `mu`, `timesteps`.

    Attributes:
        timesteps: What the network is told at each call, shape (N,).
        sigmas: The noise levels of the calls and the last, in the host's convention, shape (N + 1,).
        end_scale: What the native sampler's last sample is of x at the last level.
    """

    def __init__(
        self, native: Native, transitions: Transitions, num_inference_steps: int | None, device: Any, **given: Any
    ) -> None:
        grid = native.grid(num_inference_steps, device, **given)
        self._native, self._transitions, self._grid = native, transitions, grid
        self._blocks = transitions.lay(grid.levels, native)
        self._levels = [step.level for block in self._blocks for step in block.steps]
        self.end_scale = grid.end_scale
        self.timesteps: Tensor = grid.timesteps
        self.sigmas: Tensor = grid.sigmas
        if not transitions.on_native_grid:
            self.timesteps = native.labels(self._levels, grid)
            self.sigmas = native.sigmas([*self._levels, grid.levels[-1]])
        self._labels: list[float] = self.timesteps.tolist()

    def find(self, timestep: float) -> int:
        """Return the first call that is told a timestep.

        Raises:
            ValueError: if there is none.
        """
        if timestep not in self._labels:
            raise ValueError(f"step: timestep {timestep} is not in scheduler.timesteps: set_timesteps was called since")
        return self._labels.index(timestep)

    def level(self, timestep: float, index: int | None) -> NoiseLevel:
        """Return the noise level the host means by a timestep, which several calls, `index` among them, may be told."""
        if index is not None and index < len(self._labels) and self._labels[index] == timestep:
            return self._levels[index]
        return self._levels[self.find(timestep)] if timestep in self._labels else self._native.level_at(timestep)

    def calls(self, begin: int) -> list[PlannedCall]:
        """Return the calls of a run that begins at call `begin`.

        On the native grid the transitions are laid anew over what remains; else the host holds the times already, and
        the transition it begins in is cut. So that calls and timesteps share their index, the list begins with
        repetitions of the first.

        Raises:
            ValueError: if there is no such call.
        """
        if not 0 <= begin < len(self._labels):
            raise ValueError(f"set_begin_index: expected 0 to {len(self._labels) - 1}, got {begin}")
        if begin > 0 and self._transitions.on_native_grid:
            blocks = self._transitions.lay(self._grid.levels[begin:], self._native)
        else:
            solver, draw_first = self._transitions.solver, self._transitions.draw_first
            blocks = cut(self._blocks, begin, solver, draw_first) if begin else self._blocks
        first = self._transitions.draw_first and (begin == 0 or blocks[0].transition.base_snr > 0)  # else cut, the ODE
        calls = [
            PlannedCall(k, block, i, draws=i == 0 and (k > 0 or first))
            for k, block in enumerate(blocks)
            for i in range(len(block.steps))
        ]
        return [calls[0]] * (len(self._labels) - len(calls)) + calls
