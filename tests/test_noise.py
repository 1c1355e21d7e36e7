import math

import numpy as np
import pytest
import torch

from glassflows import RectifiedFlow, VarianceExploding, VariancePreserving
from schedules import SCHEDULES, TABLES


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_inverts_snr(name):
    schedule = SCHEDULES[name]
    for t in np.linspace(0.001, 0.999, 97):
        snr = schedule.level(float(t)).snr
        assert schedule.time(snr) == pytest.approx(t, abs=1e-10)
        assert schedule.level(schedule.time(snr)).snr == pytest.approx(snr, rel=1e-10)


@pytest.mark.parametrize("name", TABLES)
def test_snr_of_every_entry_of_a_table_inverts(name):
    times = 1 - np.arange(1, 1001) / 1000
    np.testing.assert_allclose([SCHEDULES[name].time(SCHEDULES[name].level(t).snr) for t in times], times, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_data_are_at_one(name):
    level = SCHEDULES[name].level(1.0)
    assert (level.alpha, level.sigma, level.snr) == (1.0, 0.0, math.inf)
    assert SCHEDULES[name].time(math.inf) == 1.0


def test_straight_path():
    level = RectifiedFlow().level(0.3)
    assert (level.alpha, level.sigma) == (0.3, 0.7)
    assert RectifiedFlow().time(0.0) == 0.0


@pytest.mark.parametrize("name", TABLES)
def test_variance_preserving_meets_its_table(name):
    table = TABLES[name].double()
    for n in (0, 1, 500, 998, 999):
        level = SCHEDULES[name].level(1 - (n + 1) / 1000)
        assert level.alpha == pytest.approx(math.sqrt(table[n]), abs=1e-12)
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-12)


def test_variance_exploding():
    schedule = VarianceExploding(sigma_max=40.0, sigma_data=0.7)
    assert schedule.level(0.0).sigma == pytest.approx(40.0, rel=1e-12)
    angles = [math.atan(schedule.level(t).sigma / 0.7) for t in (0.2, 0.4, 0.6)]
    assert angles[0] - angles[1] == pytest.approx(angles[1] - angles[2], abs=1e-12)
    assert all(schedule.level(t).alpha == 1 for t in (0.0, 0.5, 1.0))


def test_table_must_decrease():
    with pytest.raises(ValueError, match=r"^alphas_cumprod: expected .* table that decreases strictly within \[0, 1\)"):
        VariancePreserving(torch.tensor([0.5, 0.9]).tolist())
