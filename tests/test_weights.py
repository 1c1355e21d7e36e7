"""Weights of particles, against their definitions."""

import math

import numpy as np
import pytest
import torch

from glassflows.smc.weights import ess, log_mean, normalise


def test_weights():
    log_weights = torch.tensor([[0.1, 0.2, 0.7], [1.0, 1.0, 1.0]], dtype=torch.float64).log()
    np.testing.assert_allclose(normalise(log_weights).exp().sum(-1), 1, atol=1e-12)
    np.testing.assert_allclose(ess(log_weights), [1 / (0.01 + 0.04 + 0.49), 3], atol=1e-12)
    np.testing.assert_allclose(log_mean(log_weights), [math.log(1 / 3), 0], atol=1e-12)


def test_extreme_weights_stay_finite():
    log_weights = torch.tensor([[1e4, -1e4, 0.0]], dtype=torch.float64)
    assert ess(log_weights).item() == pytest.approx(1)
    assert log_mean(log_weights).item() == pytest.approx(1e4 - math.log(3))
