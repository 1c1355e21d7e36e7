import math

import numpy as np
import pytest
import torch

from glassflows import RectifiedFlow, sample
from glassflows.flow.sample import run_block, run_chain
from glassflows.flow.solver import Solver
from glassflows.flow.state import InnerState, moved, network_input, start
from glassflows.flow.timetable import condot_lams, timetable
from glassflows.flow.transition import transition
from oracles import Gaussian, GaussianMixture, reference

FLOW = RectifiedFlow()


def grid(num_steps):
    return [FLOW.level(float(t)) for t in np.linspace(0, 1, num_steps + 1)]


def blocks(num_steps, num_transitions, correlation="ddpm", inner_grid="time"):
    return timetable(
        grid(num_steps), num_transitions,
        schedule=FLOW, correlation=correlation, solver=Solver(grid=inner_grid),
    )  # fmt: skip


@pytest.mark.parametrize("num_transitions", [1, 3, 5, 12, 99])
def test_ddpm_visits_the_native_grid_once(num_transitions):
    times = [step.level.t for block in blocks(12, num_transitions) for step in block.steps]
    assert times == [level.t for level in grid(12)[:-1]]


def test_calls_are_split_evenly_first_ones_take_the_remainder():
    assert [len(block.steps) for block in blocks(13, 5)] == [3, 3, 3, 2, 2]


@pytest.mark.parametrize("inner_grid", ["time", "condot"])
def test_every_transition_begins_at_its_own_state(inner_grid):
    """λ = 0: the network input is x_t itself, so the denoised prediction of a new state is free."""
    for block in blocks(12, 4, correlation=0.1, inner_grid=inner_grid):
        first = block.steps[0]
        assert (first.cos, first.sin) == (1.0, 0.0)
        assert first.level == block.transition.t


def test_other_correlations_overshoot_on_the_interpolated_grid():
    """The calls of a transition lie at equal steps of the grid index, up to the time of the last precision."""
    for block in blocks(12, 4, correlation=0.1)[1:-1]:
        times = [step.level.t for step in block.steps]
        last = FLOW.time(block.transition.snr(block.transition.lam_end))
        assert last > block.transition.t_next.t
        np.testing.assert_allclose(np.diff([*times, last]), (last - times[0]) / len(times), rtol=1e-9)


def test_condot_is_uniform_in_s():
    chosen = transition(FLOW.level(0.3), FLOW.level(0.7), 0.4)
    for i, lam in enumerate(condot_lams(chosen, 8)):
        s = i / 8
        assert lam == pytest.approx(s * chosen.alpha / ((1 - s) + s * chosen.sigma), rel=1e-12)


def mixture(dimensions, components, std, seed):
    """A mixture of random means: what the orders are measured on, and nothing the solver was tuned to."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(components, dimensions, generator=generator, dtype=torch.float64)
    return GaussianMixture(means, torch.full((components,), 1 / components, dtype=torch.float64), std)


def slope(law, num_transitions=6, **options):
    """Order of convergence: slope of the log-error of chains on the native grid against a converged run."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(num_transitions, 300, law.means.shape[1], generator=generator, dtype=torch.float64)

    def run(num_steps, **options):
        return sample(
            law, draws[0], num_steps=num_steps, num_transitions=num_transitions, noises=list(draws[1:]), **options
        )

    exact = run(4800)
    calls = [48, 96, 192, 384]
    errors = [(run(n, **options) - exact).norm(dim=-1).median().item() for n in calls]
    return -np.polyfit(np.log(calls), np.log(errors), 1)[0], errors


LAWS = {"reference": reference()[0], "2-D": mixture(2, 5, 0.3, 1), "16-D": mixture(16, 10, 0.3, 0)}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_second_order(law):
    order, errors = slope(law)
    _, euler = slope(law, solver_order=1)
    assert order >= 1.8
    assert errors[0] < euler[-1]  # 48 calls beat 384 of Euler


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("num_transitions", [2, 6, 12])
def test_24_calls_beat_72_of_the_published_scheme(law, num_transitions):
    draws = torch.randn(
        num_transitions, 300, law.means.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    exact, ours, published = (
        chain(law, draws, calls, num_transitions, **options)
        for calls, options in ((2400, {}), (24, {}), (72, {"order": 1, "grid": "condot"}))
    )
    errors = [(one - exact).norm(dim=-1).median() for one in (ours, published)]
    assert errors[0] < errors[1] / 2


def test_euler_is_of_first_order():
    """Steps of λ are longest where a transition begins, ~ √P: a logarithm on the way to slope 1."""
    order, _ = slope(mixture(2, 5, 0.3, 1), num_transitions=2, solver_order=1)
    assert 0.9 <= order < 1.2


def test_uncorrected_predictor_is_of_first_order_at_fixed_number_of_transitions():
    order, _ = slope(mixture(2, 5, 0.3, 1), corrector=False)
    assert 0.8 < order < 1.4


def chain(law, draws, num_steps, num_transitions, **options):
    """`sample` with any option of the solver."""
    plan = timetable(grid(num_steps), num_transitions, schedule=FLOW, correlation="ddpm", solver=Solver(**options))
    return run_chain(plan, law, draws[0], lambda k: draws[k + 1])


def guided(law, scale, conditional):
    return lambda x, t: law(x, t) + scale * (conditional(x, t) - law(x, t))


@pytest.mark.parametrize("num_steps", [15, 20, 30])
def test_strong_guidance_does_not_blow_up(num_steps):
    """Guidance 7.5 towards a narrow law: without its limiter order 2 is far off where Euler is not."""
    broad, narrow = (
        Gaussian(torch.zeros(16).double(), torch.eye(16).double()),
        torch.linspace(0.05, 1, 16).double() ** 2,
    )
    law = guided(broad, 7.5, Gaussian(torch.zeros(16).double(), narrow.diag()))
    draws = torch.randn(5, 100, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = chain(law, draws, 1200, 5)

    def error(**options):
        return (chain(law, draws, num_steps, 5, **options) - exact).norm(dim=-1).median().item()

    assert error() < 8 * error(order=1)
    if num_steps == 15:
        assert error(trust=math.inf) > 4 * error()


def test_the_limiter_leaves_plain_denoisers_alone():
    """It is off where nothing is guided and steps are not coarse."""
    law = mixture(16, 10, 0.3, 0)
    draws = torch.randn(6, 100, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    limited, free = (chain(law, draws, 96, 6, trust=trust) for trust in (4.0, math.inf))
    assert (limited - free).norm(dim=-1).median() < 1e-6


def test_history_moves_with_its_particle():
    """Rows selected at a boundary go on exactly as their ancestors, given their noise."""
    law, ancestors = mixture(3, 5, 0.3, 0), torch.tensor([3, 0, 0, 4, 1])
    draws = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = timetable(grid(6), 2, schedule=FLOW, correlation="ddpm", solver=Solver())
    _, state = run_block(first, law, start(draws[0], first), None)
    expected, _ = run_block(second, law, state, draws[1])
    moved_on, _ = run_block(second, law, state.select(ancestors), draws[1][ancestors])
    torch.testing.assert_close(moved_on, expected[ancestors], rtol=0, atol=1e-12)


def test_rows_do_not_see_each_other():
    law = mixture(3, 5, 0.3, 0)
    draws = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = chain(law, draws, 9, 3)
    alone = chain(law, draws[:, 2:3], 9, 3)
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-12)


def test_a_constant_denoiser_is_sampled_exactly():
    """Nothing to extrapolate, nothing to divide by: every scheme ends at the constant."""
    draws = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    constant = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(chain(lambda x, t: constant, draws, 9, 3), constant, rtol=0, atol=1e-12)


def test_an_edit_moves_the_network_input_by_itself():
    """And along the sufficient direction: nothing of it is orthogonal to (cos θ, sin θ)."""
    generator = torch.Generator().manual_seed(0)
    x, e, delta = torch.randn(3, 5, 3, generator=generator, dtype=torch.float64)
    state = InnerState(x, e)
    for step in blocks(12, 3)[1].steps:
        now = network_input(step, state)
        after = moved(step, state, now + delta, now)
        torch.testing.assert_close(network_input(step, after), network_input(step, state) + delta, rtol=0, atol=1e-12)
        base, innovation = after.base - x, after.innovation - e
        torch.testing.assert_close(step.sin * base, step.cos * innovation, rtol=0, atol=1e-12)


def test_data_are_reached_by_the_last_denoised_prediction():
    step = blocks(5, 5)[-1].steps[-1]
    assert (step.keep, step.euler, step.predict) == (0.0, 1.0, 0.0)
    assert math.isinf(blocks(5, 5)[-1].transition.lam_end)


def test_options_are_checked():
    with pytest.raises(ValueError, match="solver_order: expected 1 .* got 3"):
        Solver(3)
    with pytest.raises(ValueError, match="num_transitions: expected at least 1, got 0"):
        blocks(6, 0)
    with pytest.raises(ValueError, match='inner_grid: expected "time" or "condot", got "uniform"|got \'uniform\''):
        blocks(6, 2, inner_grid="uniform")
