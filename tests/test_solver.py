import math

import numpy as np
import pytest
import torch

from glassflows import RectifiedFlow, sample
from glassflows.flow.solver import History, InnerState, Solver, condot_lams, moved, network_input, timetable
from glassflows.flow.transition import transition
from oracles import reference

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


def slope(**options):
    """Convergence order: slope of the log-error of chains of six transitions against a converged run."""
    law, _ = reference()
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(6, 300, 3, generator=generator, dtype=torch.float64)

    def run(num_steps, **options):
        return sample(law, draws[0], num_steps=num_steps, num_transitions=6, noises=list(draws[1:]), **options)

    exact = run(6000)
    calls = [96, 192, 384]
    errors = [(run(n, **options) - exact).norm(dim=-1).median().item() for n in calls]
    return -np.polyfit(np.log(calls), np.log(errors), 1)[0], errors


def test_convergence_orders():
    first, euler = slope(solver_order=1, corrector=False)
    second, two_step = slope(solver_order=2)
    assert 0.8 < first < 1.3
    assert second > 1.7
    assert two_step[0] < euler[-1]  # 96 calls of order 2 beat 384 of Euler


def test_uncorrected_predictor_is_of_first_order_at_fixed_number_of_transitions():
    order, _ = slope(solver_order=2, corrector=False)
    assert 0.8 < order < 1.4


def test_an_edit_moves_the_network_input_by_itself():
    """And along the sufficient direction: nothing of it is orthogonal to (cos θ, sin θ)."""
    generator = torch.Generator().manual_seed(0)
    x, e, delta = torch.randn(3, 5, 3, generator=generator, dtype=torch.float64)
    state = InnerState(x, e, History(e, x))
    for step in blocks(12, 3)[1].steps:
        after = moved(step, state, delta)
        torch.testing.assert_close(network_input(step, after), network_input(step, state) + delta, rtol=0, atol=1e-12)
        base, innovation = after.base - x, after.innovation - e
        torch.testing.assert_close(step.sin * base, step.cos * innovation, rtol=0, atol=1e-12)
        torch.testing.assert_close(after.history.euler - e, innovation, rtol=0, atol=1e-12)


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
