"""The algorithm as one loop over a denoiser callable: GLASS transitions, chains of them, and posterior samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .noise import NoiseSchedule, RectifiedFlow
from .solver import Block, InnerGrid, InnerState, Solver, advance, block, network_input, timetable
from .transition import Correlation, transition

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
    inner_grid: InnerGrid = "time",
    solver_order: int = 2,
    corrector: bool = True,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw x_t′ from the transition p(x_t′ | x_t) of a pre-trained model by an ODE.

        e(0) = ε̄,   de/dλ = D_t*(x_in(λ)),   x_t′ = γ̄ x_t + σ̄ e(λ̄)

    Args:
        denoiser: `denoiser(x, t) -> E[z | x_t = x]` for x of shape (N, *event) and a float t in [0, 1].
        x_t: Current state, shape (N, *event).
        t: Its time in [0, 1); 1 is data.
        t_next: Time of the next state, t < t_next ≤ 1.
        num_steps: Number of network calls.
        schedule: The model's noise schedule.
        correlation: Noise correlation ρ of x_t and x_t′: a number in [-1, 1], or "ddpm" for the DDPM reverse
            transition.
        inner_grid: "time" spaces the calls evenly in network time, "condot" evenly in s on the paper's inner path.
        solver_order: 1 for Euler, 2 for the two-step predictor.
        corrector: Whether solver order 2 also corrects each step, at no further call.
        noise: The inner noise ε̄, shape of x_t; drawn from `generator` if None.
        generator: Source of the noise, on the device of x_t; torch's default if None.

    Returns:
        x_t′, shape (N, *event).

    Raises:
        ValueError: if a time, `num_steps`, the correlation, the grid, the order or the shape of `noise` is not as
            above.

    Example:
        >>> import torch
        >>> from glassflows import sample_transition
        >>> gaussian = lambda x, t: t * x / (t**2 + (1 - t) ** 2)  # denoiser of z ~ N(0, 1)
        >>> x_t = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        >>> sample_transition(gaussian, x_t, 0.2, 0.6, num_steps=8).shape
        torch.Size([5, 3])

    Reference:
        Holderrieth et al., GLASS Flows, arXiv:2509.25170, Algorithm 1 (with the innovation e in place of x̄_s).
    """
    if not 0 <= t < t_next <= 1:
        raise ValueError(f"t, t_next: expected 0 ≤ t < t_next ≤ 1 (data are at 1), got t={t}, t_next={t_next}")
    _check_num_steps(num_steps)
    if noise is None:
        noise = _randn_like(x_t, generator)
    elif noise.shape != x_t.shape:
        raise ValueError(f"noise: expected the shape of x_t, {tuple(x_t.shape)}, got {tuple(noise.shape)}")
    plan = block(
        transition(schedule.level(t), schedule.level(t_next), correlation),
        num_steps,
        times=lambda last: [float(time) for time in np.linspace(t, last, num_steps + 1)[:-1]],
        schedule=schedule,
        solver=Solver(solver_order, corrector, inner_grid),
    )
    return _run(plan, denoiser, x_t, noise)


def sample_posterior(
    denoiser: Denoiser,
    x_t: Tensor,
    t: float,
    *,
    num_steps: int,
    schedule: NoiseSchedule = RectifiedFlow(),  # noqa: B008
    inner_grid: InnerGrid = "time",
    solver_order: int = 2,
    corrector: bool = True,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a clean sample z from the posterior p(z | x_t): the transition to t′ = 1, where ρ plays no part.

    Args, returns and raises as in `sample_transition`.

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
        inner_grid=inner_grid,
        solver_order=solver_order,
        corrector=corrector,
        noise=noise,
        generator=generator,
    )


def sample(
    denoiser: Denoiser,
    x_init: Tensor,
    *,
    num_steps: int,
    num_transitions: int,
    times: Sequence[float] | None = None,
    schedule: NoiseSchedule = RectifiedFlow(),  # noqa: B008
    correlation: Correlation = "ddpm",
    inner_grid: InnerGrid = "time",
    solver_order: int = 2,
    corrector: bool = True,
    generator: torch.Generator | None = None,
    noises: Sequence[Tensor] | None = None,
) -> Tensor:
    """Draw clean samples by a chain of GLASS transitions from initial noise (or a noised sample).

    The first transition starts from `x_init` itself and is the plain ODE; each later one draws fresh noise. One
    transition is thus the ODE sampler, one call per transition DDPM ancestral sampling (its first step without noise).

    Args:
        denoiser: As in `sample_transition`.
        x_init: Initial state at `times[0]`, shape (N, *event).
        num_steps: Number of network calls of the whole chain.
        num_transitions: Number of transitions, at least 1 and clipped to `num_steps`.
        times: The `num_steps + 1` increasing times of the grid in [0, 1]; evenly spaced from 0 to 1 if None.
        schedule, correlation, inner_grid, solver_order, corrector: As in `sample_transition`.
        generator: Source of the noise of all transitions but the first.
        noises: The noises themselves, one per transition after the first, instead of a generator.

    Returns:
        The state at `times[-1]`, shape (N, *event).

    Raises:
        ValueError: if `times` is not an increasing list of `num_steps + 1` values, or another argument is off.
    """
    _check_num_steps(num_steps)
    grid = np.linspace(0.0, 1.0, num_steps + 1) if times is None else np.asarray(times, np.float64)
    if grid.shape != (num_steps + 1,) or np.any(np.diff(grid) <= 0) or grid[0] < 0 or grid[-1] > 1:
        raise ValueError(
            f"times: expected num_steps + 1 = {num_steps + 1} increasing values in [0, 1] (noise first), got {times}"
        )
    plan = timetable(
        [schedule.level(float(t)) for t in grid],
        num_transitions,
        schedule=schedule,
        correlation=correlation,
        solver=Solver(solver_order, corrector, inner_grid),
    )
    if noises is not None and len(noises) != len(plan) - 1:
        raise ValueError(f"noises: expected one per transition after the first, {len(plan) - 1}, got {len(noises)}")
    x_t = _run(plan[0], denoiser, x_init, x_init / plan[0].transition.t.sigma)
    for k, later in enumerate(plan[1:]):
        x_t = _run(later, denoiser, x_t, _randn_like(x_t, generator) if noises is None else noises[k])
    return x_t


def _run(plan: Block, denoiser: Denoiser, x_t: Tensor, noise: Tensor) -> Tensor:
    """Run the inner ODE of one transition from e(λ_0) = noise."""
    state = InnerState(base=x_t / plan.transition.t.sigma, innovation=noise)
    for step in plan.steps:
        state = advance(step, state, denoiser(network_input(step, state), step.level.t))
    return plan.transition.next_state(state.base, state.innovation)


def _randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1 network call, got {num_steps}")
