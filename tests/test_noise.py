import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from glassflows import RectifiedFlow, VariancePreserving

TABLES = {
    "linear": DDIMScheduler().alphas_cumprod,
    "scaled_linear": DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod,
    "cosine": DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod,
    "zero_terminal_snr": DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod,
}
SCHEDULES = {"flow": RectifiedFlow()} | {name: VariancePreserving(table.double()) for name, table in TABLES.items()}


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_inverts_snr(name):
    schedule = SCHEDULES[name]
    for t in np.linspace(0.001, 0.999, 97):
        level = schedule.level(float(t))
        assert schedule.time(level.snr) == pytest.approx(t, abs=1e-10)


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


def test_table_must_decrease():
    with pytest.raises(ValueError, match="decreases strictly"):
        VariancePreserving(torch.tensor([0.5, 0.9]).tolist())
