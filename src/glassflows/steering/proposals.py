"""Where particles move: fresh noise with a mean, and the weight that makes up for it.

A GLASS transition is a deterministic map of its fresh noise. Particles that draw

    ε̄ = m + ξ,     ξ ~ N(0, I)

move to where the reward rises, if m points there, and stay draws of the target p(z) exp(λ_r r(z))
if their weights are multiplied by

    w = N(ε̄; 0, I) / N(ε̄; m, I) = exp(−m·ε̄ + |m|²/2),

for every m that is known before ξ is drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from ..scheduler.hooks import Boundary
from ..signatures import described


@dataclass(frozen=True, repr=False)
class Twist:
    """Move particles along the gradient of the reward.

        m = s λ_r · v λ̄ / √(1 + v λ̄²) · ∇_ẑ r(ẑ),     |m| ≤ limit

    The reward is linear in ẑ to first order, and ẑ answers to noise along the gradient with the
    posterior variance v = 1 / (1 + P_t), that of data of unit variance. For a linear reward of
    Gaussian data s = 1 leaves no variance to the weights. A class that derives from this one may
    have a `mean` of its own: the target stays for every m.

    Args:
        strength: s; 0 moves nothing.
        limit: The longest m, in standard deviations of the noise. It bounds the spread of the
            log-weights where the gradient promises more than the reward keeps.

    Raises:
        ValueError: if an option is no number in its range.

    Reference:
        For transitions of one network call: Wu et al., Practical and Asymptotically Exact
        Conditional Sampling in Diffusion Models, arXiv:2306.17775.
    """

    strength: float = 1.0
    limit: float = 1.5

    def __post_init__(self) -> None:
        strength = self.strength
        is_number = isinstance(strength, Real) and not isinstance(strength, bool)
        if not (is_number and math.isfinite(strength)):
            raise ValueError(
                f"twist: expected a finite number or a Twist, got {strength!r}: 0 moves nothing, "
                "1 follows the gradient"
            )
        if not (isinstance(self.limit, Real) and self.limit > 0):
            raise ValueError(f"limit: expected a number above 0, got {self.limit!r}")

    def __repr__(self) -> str:
        return described(self)

    def mean(self, gradient: Tensor, scale: Tensor, at: Boundary) -> Tensor:
        """Return m, shape (N, *event), float32.

        Args:
            gradient: ∇_ẑ r of each particle, shape (N, *event), in the units of ẑ at hooks.
            scale: λ_r of each particle, shape (N,).
            at: The boundary.
        """
        variance = 1 / (1 + at.level.snr)
        # v λ̄ / √(1 + v λ̄²), √v at λ̄ = ∞
        response = variance / math.hypot(1 / at.lam_end, math.sqrt(variance))
        m = per_row(self.strength * response * at.data_scale * scale, gradient) * gradient
        length = torch.linalg.vector_norm(m.flatten(1), dim=1)
        return per_row((self.limit / length).clamp(max=1.0), m) * m


def log_ratio(mean: Tensor, noise: Tensor) -> Tensor:
    """Return log N(ε̄; 0, I) − log N(ε̄; m, I) = −m·ε̄ + |m|²/2 of each row, shape (N,), float64.

    Args:
        mean: m, shape (N, *event).
        noise: ε̄, same shape.
    """
    m, drawn = mean.flatten(1), noise.flatten(1)
    return (m * (m / 2 - drawn)).sum(1).cpu().double()


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Return one value for each row, shape (N, 1, …), of the dtype and on the device of `like`."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))
