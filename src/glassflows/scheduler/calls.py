"""The network calls of a run: the native grid, with transitions laid over it.

A *timetable* is what one `set_timesteps` decides. A *call* of it has an index in the host's
`timesteps`, a place in a transition, and draws fresh noise or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import or_
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ..flow.noise import NoiseLevel
from ..flow.solver import Block, Solver
from ..flow.timetable import cut, excursion, timetable
from ..flow.transition import Correlations, check_num_transitions
from .hooks import Boundary, LookAhead, NetworkCall
from .native import Native

FirstTransition = Literal["ode", "posterior"]


class Excursions(NamedTuple):
    """Excursions from a boundary to data.

    Args:
        block: The transition to data; its first call is that at the boundary.
        number: How many.
    """

    block: Block
    number: int


class Call(NamedTuple):
    """A network call of a run, with what follows it.

    Args:
        block: The transition or the excursion it belongs to.
        i: Its number in that; of an excursion 0 is the call at the boundary.
        draws: Whether fresh noise is drawn after it.
        told: What hooks and observers are told of it.
        excursions: Those that leave after it.
    """

    block: Block
    i: int
    draws: bool
    told: NetworkCall
    excursions: Excursions | None = None

    @property
    def is_last(self) -> bool:
        """Whether its transition or excursion ends after it."""
        return self.i + 1 == len(self.block.steps)

    @property
    def ends_in_prediction(self) -> bool:
        """Whether its transition ends in the ẑ of this only call, whatever noise it draws."""
        return _ends_in_prediction(self.block)


@dataclass(frozen=True)
class Transitions:
    """How network calls are split into transitions, and how these are sampled.

    Args:
        number: Number of transitions, clipped to the number of calls.
        correlation: ρ of each.
        first: Whether the first is the ODE or draws noise, too.
        solver: How the inner ODE is integrated.
    """

    number: int
    correlation: Correlations
    first: FirstTransition
    solver: Solver

    def __post_init__(self) -> None:
        check_num_transitions(self.number)
        if self.first not in get_args(FirstTransition):
            raise ValueError(
                f"first_transition: expected one of {get_args(FirstTransition)}, got {self.first!r}"
            )

    @property
    def draw_first(self) -> bool:
        """Whether the first transition draws noise, too."""
        return self.first == "posterior"

    @property
    def on_native_grid(self) -> bool:
        """Whether the calls are at the native scheduler's own timesteps."""
        return self.correlation == "ddpm" and self.solver.grid == "time"

    def over(self, levels: Sequence[NoiseLevel], native: Native) -> list[Block]:
        """Return the transitions laid over a grid of noise levels."""
        return timetable(
            levels,
            self.number,
            schedule=native.schedule,
            correlation=self.correlation,
            solver=self.solver,
            draw_first=self.draw_first,
        )


class Timetable:
    """What one `set_timesteps` decides.

    Args:
        native: The native scheduler, which lays the grid.
        transitions: What is laid over the grid.
        num_inference_steps: Number of network calls, where the host names it.
        device: Device of `timesteps`.
        look_ahead: Chooses the excursions from each boundary.
        given: What else the host gave the native scheduler: `sigmas`, `mu`, `timesteps`.

    Attributes:
        timesteps: What the network is told at each call, shape (N,).
        sigmas: Noise levels of the calls and of the end, in the host's convention, shape (N + 1,).
        end_scale: What the native sampler's last sample is of x at the last level.
    """

    def __init__(
        self,
        native: Native,
        transitions: Transitions,
        num_inference_steps: int | None,
        device: Any,
        look_ahead: Callable[[Boundary], LookAhead | None] = lambda at: None,
        **given: Any,
    ) -> None:
        grid = native.grid(num_inference_steps, device, **given)
        self._native, self._transitions, self._grid = native, transitions, grid
        self._blocks = transitions.over(grid.levels, native)
        self._levels = [step.level for block in self._blocks for step in block.steps]
        self.end_scale = grid.end_scale
        self.timesteps: Tensor = grid.timesteps
        self.sigmas: Tensor = grid.sigmas
        if not transitions.on_native_grid:
            self.timesteps = native.timesteps(self._levels, grid)
            self.sigmas = native.sigmas([*self._levels, grid.levels[-1]])
        self._excursions: dict[int, Excursions] = {}
        self._excursions = self._chosen(look_ahead)
        if self._excursions:
            self._insert_excursions()
        self._told: list[float] = self.timesteps.tolist()

    @property
    def looks_ahead(self) -> bool:
        """Whether there are excursions."""
        return bool(self._excursions)

    def _chosen(self, look_ahead: Callable[[Boundary], LookAhead | None]) -> dict[int, Excursions]:
        """Return the excursions from the boundaries that have some, by transition."""
        excursions, start = {}, 0
        for at, block in zip(self._boundaries(self._blocks, 0), self._blocks, strict=True):
            chosen = look_ahead(at)
            if chosen is not None:
                ahead = excursion(
                    self._grid.levels,
                    start,
                    chosen.calls,
                    schedule=self._native.schedule,
                    solver=self._transitions.solver,
                )
                excursions[at.index] = Excursions(ahead, chosen.samples)
            start += len(block.steps)
        return excursions

    def _insert_excursions(self) -> None:
        """Tell the calls of excursions, too, where they are made."""
        route = list(self._route(self._blocks, 0))
        self._levels = [block.steps[i].level for block, i, _, _ in route]
        away = torch.tensor([number is not None for _, _, _, number in route])
        extra = [level for level, one in zip(self._levels, away.tolist(), strict=True) if one]
        self.timesteps = _merged(self.timesteps, self._timesteps_at(extra), away)
        sigmas = _merged(self.sigmas[:-1], self._native.sigmas(extra), away)
        self.sigmas = torch.cat([sigmas, self.sigmas[-1:]])

    def _route(
        self, blocks: Sequence[Block], begin: int
    ) -> Iterator[tuple[Block, int, Boundary | None, int | None]]:
        """Yield the calls of a run of these transitions in their order.

        Each is a block, the call's number in it, the boundary it is made at, and the number of the
        excursion it belongs to.
        """
        for at, block in zip(self._boundaries(blocks, begin), blocks, strict=True):
            yield block, 0, at, None
            ahead, number = self._excursions.get(at.index, (block, 0))
            for one in range(number):
                yield from ((ahead, i, None, one) for i in range(1, len(ahead.steps)))
            yield from ((block, i, None, None) for i in range(1, len(block.steps)))

    def _timesteps_at(self, levels: list[NoiseLevel]) -> Tensor:
        """Return what the network is told at levels; at those of the grid it is the native."""
        grid = self._grid
        if all(level in grid.levels for level in levels):
            return grid.timesteps[[grid.levels.index(level) for level in levels]]
        return self._native.timesteps(levels, grid)

    def find(self, timestep: float) -> int:
        """Return the index of the first call at which the network is told a timestep.

        Raises:
            ValueError: if there is none.
        """
        if timestep not in self._told:
            raise ValueError(
                f"step: timestep {timestep} is not in scheduler.timesteps: set_timesteps was "
                "called since"
            )
        return self._told.index(timestep)

    def check_due(self, timestep: Any, index: int) -> None:
        """Refuse a timestep other than that of the call that is due.

        A tensor on an accelerator passes: looking at it would wait for the accelerator.

        Raises:
            ValueError: if it is another.
        """
        due = self._told[index]
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            return
        told = timestep.tolist() if isinstance(timestep, Tensor) else timestep
        if isinstance(told, (int, float)) and told == due:  # as nearly every host sends it
            return
        numbers = np.ravel(told)
        slack = _slack(timestep, due)
        if not any(abs(number - due) <= slack for number in numbers):  # tokens not due have others
            got = ", ".join(f"{number:g}" for number in dict.fromkeys(numbers[:8].tolist()))
            raise ValueError(
                f"step: expected timestep {due:g}, which is due at call {index}, got {got}: step "
                "through scheduler.timesteps in their order, each once, or call set_timesteps and "
                "set_begin_index for a run that begins elsewhere"
            )

    def level(self, timestep: float, index: int | None) -> NoiseLevel:
        """Return the noise level the host means by a timestep.

        Args:
            timestep: The timestep, which several calls may be told.
            index: The call that is due, which is meant if it is among them.
        """
        if index is not None and index < len(self._told) and self._told[index] == timestep:
            return self._levels[index]
        if timestep in self._told:
            return self._levels[self.find(timestep)]
        return self._native.level_at(timestep)

    def calls(self, begin: int) -> list[Call]:
        """Return the calls of a run that begins at call `begin`, which stands in for those before.

        On the native grid the transitions are laid anew over what remains. Elsewhere the host holds
        the times already, and the transition that the run begins in is cut.

        Raises:
            ValueError: if there is no such call.
        """
        if not 0 <= begin < len(self._told):
            raise ValueError(f"set_begin_index: expected 0 to {len(self._told) - 1}, got {begin}")
        if self.looks_ahead and begin:  # hosts count excursions where a strength begins
            raise ValueError(
                "look_ahead: expected a run from the first of scheduler.timesteps on, got one that "
                f"begins at {begin}: pass strength=1, or leave look_ahead out"
            )
        blocks = self._blocks_from(begin)
        drawn = self._drawn(blocks, begin)
        calls: list[Call] = []
        for block, i, at, number in self._route(blocks, begin):
            told = NetworkCall(
                begin + len(calls), len(self._told), block.steps[i].level, at, number
            )
            if at is None:
                calls.append(Call(block, i, False, told))
            else:
                calls.append(Call(block, i, drawn[at.index], told, self._excursions.get(at.index)))
        return [calls[0]] * begin + calls

    def _boundaries(self, blocks: Sequence[Block], begin: int) -> list[Boundary]:
        """Return the boundaries of a run of these transitions."""
        drawn = self._drawn(blocks, begin)
        noisy = [one and not _ends_in_prediction(b) for one, b in zip(drawn, blocks, strict=True)]
        stochastic = list(accumulate(reversed(noisy), or_))[::-1]  # from there on
        number = sum(len(block.steps) for block in blocks)
        lengths = [len(block.steps) + self._away(k) for k, block in enumerate(blocks)]
        first = accumulate(lengths, initial=begin)
        return [
            Boundary(
                k,
                len(blocks),
                block.transition.t,
                stochastic[k],
                number,
                block.transition,
                self._native.data_scale,
                sum(stochastic),
                step,
            )
            for k, (block, step) in enumerate(zip(blocks, first, strict=False))
        ]

    def _away(self, k: int) -> int:
        """Return the number of calls of the excursions from a boundary."""
        if k not in self._excursions:
            return 0
        block, number = self._excursions[k]
        return number * (len(block.steps) - 1)

    def _drawn(self, blocks: Sequence[Block], begin: int) -> list[bool]:
        """Return which of these transitions draw fresh noise."""
        # a cut transition that has passed its own end is the ODE, drawn or not
        passed = begin > 0 and not blocks[0].transition.base_snr > 0
        draws_first = self._transitions.draw_first and not passed
        return [k > 0 or draws_first for k in range(len(blocks))]

    def _blocks_from(self, begin: int) -> list[Block]:
        """Return the transitions of a run that begins at call `begin`."""
        if not begin:
            return self._blocks
        if self._transitions.on_native_grid:
            return self._transitions.over(self._grid.levels[begin:], self._native)
        solver, draw_first = self._transitions.solver, self._transitions.draw_first
        return cut(self._blocks, begin, solver, draw_first)


def _merged(chain: Tensor, others: Tensor, where: Tensor) -> Tensor:
    """Return the entries of a chain and, where a mask says so, others, each in their order."""
    merged = chain.new_empty(len(where), dtype=torch.promote_types(chain.dtype, others.dtype))
    merged[~where], merged[where] = chain.to(merged), others.to(merged)
    return merged


def _ends_in_prediction(block: Block) -> bool:
    """Return whether a transition ends in the ẑ of its only call, whatever noise it draws."""
    return len(block.steps) == 1 and block.steps[0].keep == 0


def _slack(timestep: Any, due: float) -> float:
    """Return how far off a timestep may be that a host holds in a dtype of its own."""
    if isinstance(timestep, Tensor) and timestep.is_floating_point():
        return max(torch.finfo(timestep.dtype).eps, 1e-5) * max(abs(due), 0.1)
    if isinstance(timestep, (int, Tensor)):
        return due % 1  # cut to an integer
    return 1e-5 * max(abs(due), 0.1)
