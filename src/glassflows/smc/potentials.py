"""Log-potentials: how the rewards seen on the way turn into weights, so that they telescope to λ_r r_final."""

from __future__ import annotations

from torch import Tensor


def difference(rewards: Tensor, previous: Tensor, reward_scale: float) -> Tensor:
    """Return the increments λ_r (r_i − r_{i−1}) of the log-weights, shape of `rewards`; r before the first scoring is
    0.

    Reference:
        Singhal et al., arXiv:2501.06848, section 3 (difference potential).
    """
    return reward_scale * (rewards - previous)
