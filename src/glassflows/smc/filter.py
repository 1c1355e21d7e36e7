"""The particle filter: `init`, `step` → (state, info), `finish`; pure functions of frozen states.

A state holds the weights of G groups of K particles. A step adds log-potentials to the log-weights,
computed from the scaled rewards λ r, and resamples. All tensors are float64, on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .potentials import Potential, difference
from .resampling import Generators, Resampling, systematic
from .weights import ess, log_mean


@dataclass(frozen=True)
class FilterState:
    """What the next step needs of the past S steps.

    Args:
        log_weights: Log-weights since the group's last resampling, not normalised, shape (G, K).
        log_evidence: Sum of log mean weights over past resamplings, shape (G,).
        scaled: λ_j r_j along each particle's ancestry, shape (S, G, K).
        paid: Sum of the log-potentials along each particle's ancestry, shape (G, K).
    """

    log_weights: Tensor
    log_evidence: Tensor
    scaled: Tensor
    paid: Tensor


@dataclass(frozen=True)
class FilterInfo:
    """What happened in one step.

    Args:
        ancestors: Parent slot of each slot within its group, shape (G, K), int64; (G, N) where N
            were drawn.
        ess: Effective sample size before resampling, shape (G,).
        resampled: Which groups were resampled, shape (G,), bool.
        log_potential: Addition to the log-weights before resampling, shape (G, K).
    """

    ancestors: Tensor
    ess: Tensor
    resampled: Tensor
    log_potential: Tensor


def init(num_groups: int, num_particles: int) -> FilterState:
    """Return G groups of K particles of equal weights, none of them scored."""
    zeros = torch.zeros(num_groups, num_particles, dtype=torch.float64, device="cpu")
    return FilterState(zeros, zeros[:, 0].clone(), zeros[None][:0], zeros)


def step(
    state: FilterState,
    scaled: Tensor,
    *,
    ess_threshold: float,
    generators: Generators,
    potential: Potential = difference,
    resampling: Resampling = systematic,
    number: int | None = None,
) -> tuple[FilterState, FilterInfo]:
    """Weigh the particles by new rewards, then resample each group whose ESS is too small.

    Every group is resampled where a number of survivors is given. They stand for the K that were
    weighed: they have equal weights, and the log mean weight of the K joins the log-evidence.

    Args:
        scaled: λ r of each particle, shape (G, K), float64.
        ess_threshold: A group is resampled when its ESS falls below this fraction of K.
        generators: One per group; only groups that are resampled draw from theirs.
        potential: Maps scaled rewards to the additions to the log-weights.
        resampling: Scheme that draws the parents.
        number: N, the particles of each group in the next generation; None for K.

    Returns:
        The state of the next generation, and what happened. A group that is not resampled keeps its
        particles and weights.
    """
    history = torch.cat([state.scaled, scaled[None]])
    log_potential = potential(history.clone())
    log_weights, paid = state.log_weights + log_potential, state.paid + log_potential
    sizes = ess(log_weights)
    groups, particles = scaled.shape
    # the margin keeps rounding from resampling equal weights or a group at the threshold
    resampled = sizes < ess_threshold * particles * (1 - 1e-6)
    if number is not None:
        resampled = torch.ones_like(resampled)
    width = number or particles
    ancestors = torch.arange(width, device=scaled.device).expand(groups, width).clone()
    for group in resampled.nonzero().flatten().tolist():
        one = log_weights[group : group + 1], generators[group : group + 1]
        ancestors[group] = (resampling(*one) if number is None else resampling(*one, number))[0]
    new = FilterState(
        log_weights=torch.where(resampled[:, None], 0.0, log_weights.gather(-1, ancestors)),
        log_evidence=state.log_evidence + torch.where(resampled, log_mean(log_weights), 0.0),
        scaled=history.gather(-1, ancestors.expand(len(history), -1, -1)),
        paid=paid.gather(-1, ancestors),
    )
    return new, FilterInfo(ancestors, sizes, resampled, log_potential)


def reweigh(state: FilterState, log_ratio: Tensor) -> FilterState:
    """Multiply the weights of particles that moved by another law than the model's.

    No potential has paid for this: the additions for rewards still sum to λ r_final.

    Args:
        log_ratio: Log of the density of each move under the model's law, less that under the law it
            was drawn from, shape (G, K), float64.
    """
    return replace(state, log_weights=state.log_weights + log_ratio)


def finish(state: FilterState, scaled: Tensor) -> FilterState:
    """Weigh the final samples by λ r_final − Σ log-potentials.

    All additions to a particle's log-weight then sum to λ r_final.
    """
    history = torch.cat([state.scaled, scaled[None]])
    return FilterState(state.log_weights + scaled - state.paid, state.log_evidence, history, scaled)


def log_evidence(state: FilterState) -> Tensor:
    """Return the estimate of log E[exp(λ_r r)], shape (G,).

    After `finish` the exponential of the estimate is unbiased.
    """
    return state.log_evidence + log_mean(state.log_weights)


def scale_for_ess(rewards: Tensor, fraction: float) -> Tensor:
    """Return the λ at which weights exp(λ r) have an ESS of this fraction of K, shape (G,).

    The λ is found by bisection. With m equal highest rewards the ESS stays above m. If m is no
    less than the fraction of K (as with two particles and a fraction of 1/2), the λ for an ESS of
    (m + K)/2 is returned. If all rewards are equal, NaN is returned.

    Args:
        rewards: Shape (G, K), float64.
        fraction: In (0, 1).
    """
    number, highest = rewards.shape[-1], rewards.amax(-1, keepdim=True)
    ties = (rewards == highest).sum(-1).to(rewards)
    wanted = torch.where(ties < fraction * number, fraction * number, (ties + number) / 2)
    spread = (rewards.amax(-1) - rewards.amin(-1))[:, None]
    unit = (rewards - highest) / torch.where(spread > 0, spread, 1.0)
    low, high = torch.full_like(spread, 1e-9), torch.full_like(spread, 1e15)
    for _ in range(120):
        middle = (low * high).sqrt()
        flat = (ess(unit * middle) > wanted)[:, None]
        low, high = torch.where(flat, middle, low), torch.where(flat, high, middle)
    return torch.where(spread > 0, high / spread, torch.nan)[:, 0]
