"""Log-weights of particles, shape (G, K), normalised or not: one row per group.

The weight of particle k in group g is w_gk, and its normalised weight is W_gk = w_gk / Σ_j w_gj.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normalise(log_weights: Tensor) -> Tensor:
    """Return log W with Σ_k W_gk = 1 in each group, shape (G, K)."""
    return torch.log_softmax(log_weights, -1)


def log_mean(log_weights: Tensor) -> Tensor:
    """Return log (1/K Σ_k w_gk), shape (G,)."""
    return torch.logsumexp(log_weights, -1) - math.log(log_weights.shape[-1])


def ess(log_weights: Tensor) -> Tensor:
    """Return the effective sample size 1 / Σ_k W_gk², shape (G,), between 1 and K."""
    return torch.exp(-torch.logsumexp(2 * normalise(log_weights), -1))
