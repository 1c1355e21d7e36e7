"""What a GLASS scheduler tells of a run, and where others may act in it.

A *boundary* is the start of a transition. The network's first call there gives ẑ = E[z | x_t], the
denoised prediction of the state x_t itself, before fresh noise is drawn. An *observer* is told and
returns nothing; a *transition hook* may also choose which rows go on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

from torch import Tensor

from ..flow.noise import NoiseLevel
from ..flow.transition import Transition


@dataclass(frozen=True)
class Boundary:
    """The start of a transition.

    Args:
        index: Number of the transition, from 0.
        total: Number of transitions of the run.
        level: Noise level of x_t.
        stochastic: Whether fresh noise of this or a later transition still matters. If not, equal
            rows stay equal to the end: in a transition to data of one call the end is ẑ itself.
        num_calls: Number of network calls of the run.
        transition: The coefficients of the transition; None where no run is laid.
        data_scale: Units of ẑ, as a hook gets it, per standard deviation of the data.
        num_stochastic: How many boundaries of the run are stochastic, the first ones; None for all.
        step: Index of its network call in `scheduler.timesteps`; where excursions are asked for,
            before they are laid, as if there were none.
    """

    index: int
    total: int
    level: NoiseLevel
    stochastic: bool = True
    num_calls: int = 0
    transition: Transition | None = None
    data_scale: float = 1.0
    num_stochastic: int | None = None
    step: int = 0

    @property
    def lam_end(self) -> float:
        """λ̄ of the transition, √ of the precision with which its innovation measures z in the end.

        It is infinite for a transition to data.
        """
        return math.inf if self.transition is None else self.transition.lam_end


@dataclass(frozen=True)
class NetworkCall:
    """A network call of a run.

    Args:
        index: Its index in `scheduler.timesteps`.
        total: Number of entries of `scheduler.timesteps`.
        level: Noise level of the network's input.
        boundary: The boundary it is made at; None within a transition or an excursion.
        excursion: Number of the excursion from the last boundary that it belongs to, from 0; None
            for a call of the chain itself.
    """

    index: int
    total: int
    level: NoiseLevel
    boundary: Boundary | None
    excursion: int | None = None


@dataclass(frozen=True)
class LookAhead:
    """Excursions from a boundary to data, each of which ends in a draw from p(z | x_t).

    Args:
        calls: Number m of network calls of each, beside that of the boundary, which they share.
        samples: Number S of excursions.

    Raises:
        ValueError: if one is no whole number of at least 1.
    """

    calls: int = 1
    samples: int = 1

    def __post_init__(self) -> None:
        for option, value in (("look_ahead", self.calls), ("look_ahead_samples", self.samples)):
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            if not whole or value < 1:
                raise ValueError(f"{option}: expected a whole number of at least 1, got {value!r}")


class TransitionHook:
    """What may be done inside a run, as `scheduler.hook`. Each method of this class does nothing.

    A hook belongs to one run. An exception that it raises ends the run and passes through.
    """

    def admit(self) -> None:
        """Refuse, by raising, a caller of `set_timesteps` or `step` that is not the hook's own."""

    def look_ahead(self, at: Boundary) -> LookAhead | None:
        """Choose the excursions from a boundary, when the timetable of a run is laid.

        The chain itself goes on as if there were none.
        """
        return None

    def arrived(self, at: Boundary, z: Tensor) -> None:
        """Take note of the end of an excursion.

        Args:
            at: The boundary that it left from; `at_boundary` follows after the last excursion.
            z: A draw from p(z | x_t), as the last latents of a run are, float32, (N, *event).
        """

    def begins(self, seeds: list[int]) -> None:
        """Take note that a run begins.

        Args:
            seeds: One for each row, by which a hook may seed what it draws: they follow the
                generator of the call.
        """

    def at_boundary(self, at: Boundary, x_t: Tensor, z: Tensor) -> Tensor | None:
        """Choose the rows that go on, before fresh noise is drawn.

        Args:
            at: The boundary.
            x_t: The state, as the pipeline holds it, shape (N, *event).
            z: Its denoised prediction, float32, same shape.

        Returns:
            N indices of rows, an int64 tensor; None for all of them as they are.
        """
        return None

    def living(self) -> Tensor | None:
        """Return the rows that go on being worked on since the last boundary.

        The others rest: no network sees them, and what becomes of them does not matter. A steered
        run asks; a scheduler alone does not.

        Returns:
            Indices of rows, increasing, an int64 tensor on the CPU; None for all. A row that rests
            rests to the end.
        """
        return None

    def shift(self, at: Boundary, z: Tensor) -> Tensor | None:
        """Choose the mean of the fresh noise of a transition, after the rows that go on.

        A boundary whose fresh noise does not matter is not asked.

        Args:
            at: The boundary.
            z: The denoised prediction of the rows that went on, float32, shape (N, *event).

        Returns:
            The mean m of the noise ε̄ = m + ξ, shape of z; None for 0.
        """
        return None

    def drew(self, at: Boundary, noise: Tensor) -> None:
        """Take note of the fresh noise ε̄ of a transition, its mean included, shape (N, *event)."""

    def after_call(self, call: NetworkCall, x_next: Tensor) -> None:
        """Take note of a network call and of the latents that the pipeline is handed after it.

        Args:
            call: The call.
            x_next: The latents, shape (N, *event); they belong to the scheduler: do not write.
        """

    def after_prediction(self, call: NetworkCall, z: Tensor) -> None:
        """Take note of the denoised prediction of a call of the chain, of the rows that went on.

        That of a boundary is told when its excursions are back.

        Args:
            call: The call.
            z: The denoised prediction in the host's units, shape (N, *event) and dtype of the
                latents; the pipeline is handed it, too: do not write.
        """

    def for_copy(self) -> TransitionHook | None:
        """Return the hook of a copy of the scheduler (LTX-2 copies its own for the sound)."""
        return None
