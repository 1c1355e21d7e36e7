"""Timetables: which network calls a transition makes, and where."""

import numpy as np
import pytest

from glassflows.flow.timetable import condot_lams
from glassflows.flow.transition import transition
from schedules import FLOW, blocks, grid


@pytest.mark.parametrize("num_transitions", [1, 3, 5, 12, 99])
def test_ddpm_visits_the_native_grid_once(num_transitions):
    times = [step.level.t for block in blocks(12, num_transitions) for step in block.steps]
    assert times == [level.t for level in grid(12)[:-1]]


def test_calls_are_split_evenly_first_ones_take_the_remainder():
    assert [len(block.steps) for block in blocks(13, 5)] == [3, 3, 3, 2, 2]


@pytest.mark.parametrize("inner_grid", ["time", "condot"])
def test_every_transition_begins_at_its_own_state(inner_grid):
    """λ = 0: the network input is x_t itself, so the denoised prediction of a new state is free."""
    for block in blocks(12, 4, correlation=0.1, grid=inner_grid):
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


def test_the_number_of_transitions_is_checked():
    with pytest.raises(ValueError, match="^num_transitions: expected at least 1, got 0$"):
        blocks(6, 0)
