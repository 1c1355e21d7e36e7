"""Log-potentials: what the rewards on the way add to the log-weights.

A potential is a function of the scaled rewards λ_j r_j along each particle's own ancestry, shape
(S, G, K), the newest last. The final weighing adds λ r_final − Σ log-potentials, so that the
additions sum to λ r_final for every potential.

Reference:
    Singhal et al., arXiv:2501.06848, section 3.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Potential = Callable[[Tensor], Tensor]


def difference(scaled: Tensor) -> Tensor:
    """Return λ_i r_i − λ_{i−1} r_{i−1}, shape (G, K); r before the first scoring is 0."""
    return scaled[-1] - scaled[-2] if len(scaled) > 1 else scaled[-1]


def maximum(scaled: Tensor) -> Tensor:
    """Return max_{j ≤ i} λ_j r_j, shape (G, K)."""
    return scaled.amax(0)


def total(scaled: Tensor) -> Tensor:
    """Return Σ_{j ≤ i} λ_j r_j, shape (G, K)."""
    return scaled.sum(0)


POTENTIALS: dict[str, Potential] = {"difference": difference, "max": maximum, "sum": total}


def potential_named(potential: str | Potential) -> Potential:
    """Return a potential by its name; a function is returned as it is.

    Raises:
        ValueError: if no potential has that name.
    """
    if callable(potential):
        return potential
    if potential not in POTENTIALS:
        raise ValueError(
            f"potential: expected one of {', '.join(POTENTIALS)} or a function, got {potential!r}"
        )
    return POTENTIALS[potential]
