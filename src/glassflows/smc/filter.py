"""The particle filter: `init`, `step` → (state, info), `weigh`. Pure functions of frozen states, float64, CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .potentials import difference
from .resampling import systematic
from .weights import ess, log_mean


@dataclass(frozen=True)
class FilterState:
    """What the next step needs.

    Args:
        log_weights: Carried since the last resampling of the group, shape (G, K); not normalised.
        log_evidence: log of the mean weight collected at past resamplings, shape (G,).
        rewards: r of each particle when last scored, shape (G, K); 0 before the first time.
    """

    log_weights: Tensor
    log_evidence: Tensor
    rewards: Tensor


@dataclass(frozen=True)
class FilterInfo:
    """What a person wants to see of one step.

    Args:
        ancestors: Parent slot of each slot within its group, shape (G, K), int64.
        ess: Effective sample size before resampling, shape (G,).
        resampled: Which groups were resampled, shape (G,), bool.
    """

    ancestors: Tensor
    ess: Tensor
    resampled: Tensor


def init(num_groups: int, num_particles: int) -> FilterState:
    """Return G groups of K equally weighted particles, none of them scored."""
    zeros = torch.zeros(num_groups, num_particles, dtype=torch.float64)
    return FilterState(log_weights=zeros, log_evidence=zeros[:, 0].clone(), rewards=zeros)


def weigh(state: FilterState, rewards: Tensor, reward_scale: float) -> FilterState:
    """Add the log-potentials of new rewards (G, K) to the log-weights."""
    log_potential = difference(rewards, state.rewards, reward_scale)
    return FilterState(state.log_weights + log_potential, state.log_evidence, rewards)


def step(
    state: FilterState, rewards: Tensor, *, reward_scale: float, ess_threshold: float, uniforms: Tensor
) -> tuple[FilterState, FilterInfo]:
    """Weigh the particles by new rewards, then resample each group whose effective sample size is too small.

    Args:
        rewards: r of each particle, shape (G, K), float64.
        reward_scale: λ_r.
        ess_threshold: A group is resampled when its ESS falls below this fraction of K.
        uniforms: One u per group for systematic resampling, shape (G,).

    Returns:
        The state of the (possibly) new generation, and what happened. A group that is not resampled carries its
        weights.
    """
    state = weigh(state, rewards, reward_scale)
    sizes = ess(state.log_weights)
    resampled = sizes < ess_threshold * rewards.shape[-1]
    chosen = resampled[:, None]
    ancestors = torch.where(chosen, systematic(state.log_weights, uniforms), torch.arange(rewards.shape[-1]))
    new = FilterState(
        log_weights=torch.where(chosen, 0.0, state.log_weights),
        log_evidence=state.log_evidence + torch.where(resampled, log_mean(state.log_weights), 0.0),
        rewards=rewards.gather(-1, ancestors),
    )
    return new, FilterInfo(ancestors, sizes, resampled)


def log_evidence(state: FilterState) -> Tensor:
    """Return the estimate of log E[exp(λ_r r)], shape (G,); unbiased on the natural scale after the final `weigh`."""
    return state.log_evidence + log_mean(state.log_weights)
