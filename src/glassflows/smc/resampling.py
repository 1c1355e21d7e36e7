"""Resampling: draw the parents of the next generation in proportion to their weights.

Every scheme takes log-weights, shape (G, K), float64, normalised or not, one generator per group,
and the number N of children of a group, K if it is None. It returns ancestors, the parent slot of
each new slot, shape (G, N), int64. Ancestors increase in each group, and none has weight zero. The
expected number of children of particle j is N W_j; the schemes differ in how far the numbers
scatter about N W_j.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .weights import normalise

Generators = list[torch.Generator]


class Resampling(Protocol):
    """A scheme."""

    def __call__(
        self, log_weights: Tensor, generators: Generators, number: int | None = None, /
    ) -> Tensor: ...


def systematic(log_weights: Tensor, generators: Generators, number: int | None = None) -> Tensor:
    """Resample by one uniform u per group (the default).

        ancestor of slot i  =  min {j : W_1 + … + W_j > (i + u) / N}

    Every particle gets ⌊N W⌋ or ⌈N W⌉ children.
    """
    number = number or log_weights.shape[-1]
    return _inverse(
        log_weights, _positions(log_weights, number) + _uniforms(generators, 1) / number
    )


def stratified(log_weights: Tensor, generators: Generators, number: int | None = None) -> Tensor:
    """Resample by one uniform per slot, each in its own stratum.

    Every particle gets fewer than ⌈N W⌉ + 2 and more than ⌊N W⌋ − 2 children.
    """
    number = number or log_weights.shape[-1]
    positions = _positions(log_weights, number) + _uniforms(generators, number) / number
    return _inverse(log_weights, positions)


def multinomial(log_weights: Tensor, generators: Generators, number: int | None = None) -> Tensor:
    """Resample by independent draws, for comparison.

    Of 8 particles of equal weights, 5.2 on average have children.
    """
    number = number or log_weights.shape[-1]
    return _inverse(log_weights, _uniforms(generators, number).sort(-1).values)


def residual(log_weights: Tensor, generators: Generators, number: int | None = None) -> Tensor:
    """Give every particle ⌊N W⌋ children, and draw the others from the remaining weights."""
    number = number or log_weights.shape[-1]
    expected = number * normalise(log_weights).exp()
    sure = _whole(expected)
    rest = (expected - sure).clamp(min=0.0)
    rows = []
    for counts, left, generator in zip(sure, rest, generators, strict=True):
        missing = number - int(counts.sum())
        if missing:
            draws = _uniforms([generator], missing)
            children = _inverse(left.log()[None], draws)[0]
            counts = counts + torch.bincount(children, minlength=len(counts))
        rows.append(counts)
    return _ancestors(torch.stack(rows))


def ssp(log_weights: Tensor, generators: Generators, number: int | None = None) -> Tensor:
    """Resample by the Srinivasan sampling process.

    Every particle gets ⌊N W⌋ or ⌈N W⌉ children, and these numbers are negatively
    associated. Two fractions at a time exchange mass, at random and with their means kept, until
    one of the two is 0 or 1.

    Reference:
        Gerber, Chopin and Whiteley, Negative association, ordering and convergence of resampling
        methods, 2019.
    """
    particles = log_weights.shape[-1]
    number = number or particles
    expected = number * normalise(log_weights).exp()
    sure = _whole(expected)
    counts = sure.clone()
    uniforms = _uniforms(generators, particles)
    for group, fractions in enumerate((expected - sure).clamp(0.0, 1.0).tolist()):
        held, mass = 0, fractions[0]
        for other in range(1, particles):
            a, b, u = mass, fractions[other], float(uniforms[group, other])
            give, take = min(a, 1 - b), min(b, 1 - a)  # from the held to the other, and back
            if give + take == 0:  # both whole already, or both empty
                counts[group, held] += round(a)
                held, mass = other, b
                continue
            # with this probability the held fraction gives, and the means are kept
            if u * (give + take) < take:
                a, b = a - give, b + give
            else:
                a, b = a + take, b - take
            whole_is_held = a <= _TINY or a >= 1 - _TINY
            settled, left, settled_mass, mass = (
                (held, other, a, b) if whole_is_held else (other, held, b, a)
            )
            counts[group, settled] += round(settled_mass)
            held = left
        counts[group, held] += number - int(counts[group].sum())
    return _ancestors(counts)


RESAMPLING: dict[str, Resampling] = {
    "systematic": systematic,
    "stratified": stratified,
    "residual": residual,
    "ssp": ssp,
    "multinomial": multinomial,
}

_TINY = 1e-9


def resampling_named(resampling: str) -> Resampling:
    """Return a scheme by its name.

    Raises:
        ValueError: if no scheme has that name.
    """
    if resampling not in RESAMPLING:
        raise ValueError(f"resampling: expected one of {', '.join(RESAMPLING)}, got {resampling!r}")
    return RESAMPLING[resampling]


def _positions(log_weights: Tensor, number: int) -> Tensor:
    """Return 0, 1/N, …, (N − 1)/N."""
    return torch.arange(number, dtype=torch.float64, device=log_weights.device) / number


def _inverse(log_weights: Tensor, positions: Tensor) -> Tensor:
    """Return the slot min {j : W_1 + … + W_j > position} of each position in [0, 1)."""
    cumulative = normalise(log_weights).exp().cumsum(-1)
    return torch.searchsorted(cumulative / cumulative[:, -1:], positions.contiguous(), right=True)


def _uniforms(generators: Generators, number: int) -> Tensor:
    """Return `number` uniforms per group, shape (G, number), on a grid of 2⁻³² in [0, 1)."""
    draws = [
        torch.randint(2**32, (number,), generator=generator, dtype=torch.int64, device="cpu")
        for generator in generators
    ]
    return torch.stack(draws).double() / 2**32


def _whole(expected: Tensor) -> Tensor:
    """Return ⌊N W⌋, int64; a value that rounding put just below a whole number is whole."""
    return (expected + _TINY).floor().long()


def _ancestors(counts: Tensor) -> Tensor:
    """Return each slot as often as it has children, shape (G, N); `counts` has shape (G, K)."""
    slots = torch.arange(counts.shape[-1], device=counts.device)
    return torch.stack([slots.repeat_interleave(row) for row in counts])
