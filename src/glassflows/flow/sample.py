"""The algorithm as a loop over a denoiser: a transition, a posterior sample, a value, a chain.

A denoiser is a function `denoiser(x, t)` that returns E[z | x_t = x]. A transition draws x_t′
given x_t. A posterior sample is a clean sample z given x_t. The value of x_t for a reward r is
log E[exp r(z) | x_t]. A chain is a sequence of transitions from noise (t = 0) to data (t = 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .noise import NoiseSchedule, RectifiedFlow
from .solver import Block, Solver, SolverOptions
from .state import InnerState, inner_step, network_input, start
from .timetable import block_of, timetable
from .transition import Correlation, Correlations, transition

if TYPE_CHECKING:
    from typing_extensions import Unpack

Denoiser = Callable[[Tensor, float], Tensor]


def sample_transition(
    denoiser: Denoiser,
    x_t: Tensor,
    t: float,
    t_next: float,
    *,
    num_steps: int,
    schedule: NoiseSchedule = RectifiedFlow(),  # noqa: B008 (frozen)
    correlation: Correlation = "ddpm",
    solver: Solver = Solver(),  # noqa: B008 (frozen)
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    **options: Unpack[SolverOptions],
) -> Tensor:
    """Draw x_t′ from the transition p(x_t′ | x_t) of a pre-trained model by an ODE.

        e(0) = ε̄,   de/dλ = D_t*(x_in(λ)),   x_t′ = γ̄ x_t + σ̄ e(λ̄)

    Args:
        denoiser: `denoiser(x, t) -> E[z | x_t = x]` for x of shape (N, *event)
            and a float t in [0, 1].
        x_t: Current state, shape (N, *event).
        t: Its time in [0, 1); 1 is data.
        t_next: Time of the next state, t < t_next ≤ 1.
        num_steps: Number of network calls.
        schedule: The model's noise schedule.
        correlation: Noise correlation ρ of x_t and x_t′: a number in [-1, 1], or "ddpm" for the
            DDPM reverse transition.
        solver: How the inner ODE is integrated.
        noise: The inner noise ε̄, shape of x_t; drawn from `generator` if None.
        generator: Source of the noise, on the device of x_t; torch's default if None.
        options: `solver_order`, `corrector` and `inner_grid` in place of the solver's own.

    Returns:
        x_t′, shape (N, *event).

    Raises:
        ValueError: if a time, `num_steps`, the correlation, the grid, the order or the shape of
            `noise` is not as above.

    Example:
        >>> import torch
        >>> from glassflows import sample_transition
        >>> gaussian = lambda x, t: t * x / (t**2 + (1 - t) ** 2)  # denoiser of z ~ N(0, 1)
        >>> x_t = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        >>> sample_transition(gaussian, x_t, 0.2, 0.6, num_steps=8).shape
        torch.Size([5, 3])

    Reference:
        Holderrieth et al., GLASS Flows, arXiv:2509.25170, Algorithm 1 (with e in place of x̄_s).
    """
    if not 0 <= t < t_next <= 1:
        raise ValueError(
            f"t, t_next: expected 0 ≤ t < t_next ≤ 1 (data are at 1), got t={t}, t_next={t_next}"
        )
    _check_num_steps(num_steps)
    if noise is None:
        noise = _randn_like(x_t, generator)
    elif noise.shape != x_t.shape:
        raise ValueError(
            f"noise: expected the shape of x_t, {tuple(x_t.shape)}, got {tuple(noise.shape)}"
        )
    laid = block_of(
        transition(schedule.level(t), schedule.level(t_next), correlation),
        num_steps,
        times=lambda last: [float(time) for time in np.linspace(t, last, num_steps + 1)[:-1]],
        schedule=schedule,
        solver=solver.with_options(options),
    )
    return run_block(laid, denoiser, start(x_t, laid), noise)[0]


def sample_posterior(
    denoiser: Denoiser,
    x_t: Tensor,
    t: float,
    *,
    num_steps: int,
    schedule: NoiseSchedule = RectifiedFlow(),  # noqa: B008 (frozen)
    solver: Solver = Solver(),  # noqa: B008 (frozen)
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    **options: Unpack[SolverOptions],
) -> Tensor:
    """Draw a clean sample z from the posterior p(z | x_t).

    This is the transition to t′ = 1, which does not depend on ρ. Arguments, return value and
    errors are those of `sample_transition`.

    Reference:
        Holderrieth et al., GLASS Flows, arXiv:2509.25170, section 4.
    """
    return sample_transition(
        denoiser,
        x_t,
        t,
        1.0,
        num_steps=num_steps,
        schedule=schedule,
        solver=solver,
        noise=noise,
        generator=generator,
        **options,
    )


def value(
    denoiser: Denoiser,
    x_t: Tensor,
    t: float,
    reward: Callable[[Tensor], Tensor],
    *,
    num_samples: int,
    num_steps: int,
    schedule: NoiseSchedule = RectifiedFlow(),  # noqa: B008 (frozen)
    solver: Solver = Solver(),  # noqa: B008 (frozen)
    generator: torch.Generator | None = None,
    **options: Unpack[SolverOptions],
) -> Tensor:
    """Estimate the value function V_t(x_t) = log E[exp r(z) | x_t] from posterior samples.

        V̂ = log 1/S Σ_s exp r(z_s),   z_s ~ p(z | x_t)

    The logarithm makes V̂ low on average, by about Var[exp r] / (2 S E[exp r]²).

    Args:
        denoiser, x_t, t: As in `sample_transition`.
        reward: `reward(z)` of M clean samples, shape (M, *event), returns M finite scores r(z),
            scale included.
        num_samples: S, number of posterior samples of each row; all N · S run as one batch.
        num_steps: Network calls per posterior sample.
        schedule, solver, generator, options: As in `sample_transition`.

    Returns:
        V̂, shape (N,), float64.

    Raises:
        ValueError: if the reward does not return one score per sample, or another argument is not
            as above.

    Example:
        >>> import torch
        >>> from glassflows import value
        >>> gaussian = lambda x, t: t * x / (t**2 + (1 - t) ** 2)  # denoiser of z ~ N(0, 1)
        >>> x_t = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        >>> value(gaussian, x_t, 0.6, lambda z: z.sum(-1), num_samples=16, num_steps=8).shape
        torch.Size([5])

    Reference:
        Holderrieth et al., GLASS Flows, arXiv:2509.25170, section 6.1.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    z = sample_posterior(
        denoiser,
        x_t.repeat_interleave(num_samples, 0),
        t,
        num_steps=num_steps,
        schedule=schedule,
        solver=solver,
        generator=generator,
        **options,
    )
    scores = reward(z)
    if not isinstance(scores, Tensor):  # numbers of Python are of double precision
        scores = torch.as_tensor(scores, dtype=torch.float64, device="cpu")
    if scores.shape != (len(z),):
        raise ValueError(
            f"reward returned shape {tuple(scores.shape)}; expected one score per sample, "
            f"shape ({len(z)},): return one float for each z"
        )
    scores = scores.cpu() if scores.device.type == "mps" else scores  # which has no float64
    return scores.double().view(len(x_t), num_samples).logsumexp(1) - math.log(num_samples)


def sample(
    denoiser: Denoiser,
    x_init: Tensor,
    *,
    num_steps: int,
    num_transitions: int,
    times: Sequence[float] | None = None,
    schedule: NoiseSchedule = RectifiedFlow(),  # noqa: B008 (frozen)
    correlation: Correlations = "ddpm",
    solver: Solver = Solver(),  # noqa: B008 (frozen)
    generator: torch.Generator | None = None,
    noises: Sequence[Tensor] | None = None,
    **options: Unpack[SolverOptions],
) -> Tensor:
    """Draw clean samples by a chain of GLASS transitions from initial noise (or a noised sample).

    The first transition starts from `x_init` itself and is the plain ODE. Each later transition
    draws fresh noise. A chain of one transition is thus the ODE sampler. A chain of one network
    call per transition is DDPM ancestral sampling (its first step without noise).

    Args:
        denoiser: As in `sample_transition`.
        x_init: Initial state at `times[0]`, shape (N, *event).
        num_steps: Number of network calls of the whole chain.
        num_transitions: Number of transitions, at least 1 and clipped to `num_steps`.
        times: The `num_steps + 1` increasing times of the grid in [0, 1]; evenly spaced from 0 to 1
            if None.
        schedule, solver, options: As in `sample_transition`.
        correlation: As in `sample_transition`, or a list with one value per transition (the first
            transition, the plain ODE, does not use its value), or a function (t, t′) ↦ ρ such
            as `renewal(0.5)`.
        generator: Source of the noise of all transitions but the first.
        noises: The noises themselves, one per transition after the first, instead of a generator.

    Returns:
        The state at `times[-1]`, shape (N, *event).

    Raises:
        ValueError: if `times` is not an increasing list of `num_steps + 1` values, or another
            argument is not as above.
    """
    _check_num_steps(num_steps)
    grid = np.linspace(0.0, 1.0, num_steps + 1) if times is None else np.asarray(times, np.float64)
    if (
        grid.shape != (num_steps + 1,)
        or not np.all(np.diff(grid) > 0)
        or grid[0] < 0
        or grid[-1] > 1
    ):
        raise ValueError(
            f"times: expected num_steps + 1 = {num_steps + 1} increasing values in [0, 1] "
            f"(noise first), got {times}"
        )
    blocks = timetable(
        [schedule.level(float(t)) for t in grid],
        num_transitions,
        schedule=schedule,
        correlation=correlation,
        solver=solver.with_options(options),
    )
    if noises is not None:
        _check_noises(noises, len(blocks) - 1, x_init)
    return run_chain(
        blocks,
        denoiser,
        x_init,
        lambda k: _randn_like(x_init, generator) if noises is None else noises[k],
    )


def run_chain(
    blocks: Sequence[Block], denoiser: Denoiser, x_init: Tensor, noise: Callable[[int], Tensor]
) -> Tensor:
    """Run the transitions of a timetable from x_init; return the state at the end of the last.

    Args:
        blocks: The transitions, the first of them out of x_init.
        noise: Maps k to the fresh noise of the k-th transition after the first.
    """
    x_t, state = run_block(blocks[0], denoiser, start(x_init, blocks[0]), None)
    for k, block in enumerate(blocks[1:]):
        x_t, state = run_block(block, denoiser, state, noise(k))
    return x_t


def run_block(
    block: Block, denoiser: Denoiser, state: InnerState, noise: Tensor | None
) -> tuple[Tensor, InnerState]:
    """Run the inner ODE of one transition; return x_t′ and the initial state of the next.

    Args:
        noise: Fresh noise ε̄, the initial e; None to go on from the e of `state`.
    """
    x = network_input(block.steps[0], state)
    for i, step in enumerate(block.steps):
        denoised = denoiser(x, step.level.t)
        x, state = inner_step(block, i, state, denoised, noise if i == 0 else None)
    return x, state


def _check_noises(noises: Sequence[Tensor], number: int, x_init: Tensor) -> None:
    if len(noises) != number:
        raise ValueError(
            f"noises: expected one per transition after the first, {number}, got {len(noises)}"
        )
    shapes = [tuple(noise.shape) for noise in noises]
    if any(shape != x_init.shape for shape in shapes):
        raise ValueError(
            f"noises: expected the shape of x_init, {tuple(x_init.shape)}, for each, got {shapes}: "
            "rows that share their noise are not independent"
        )


def _randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1 network call, got {num_steps}")
