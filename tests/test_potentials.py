"""Potentials: how rewards along an ancestry turn into weights."""

import pytest
import torch

from glassflows.smc.potentials import POTENTIALS, potential_named


def test_potentials_are_what_they_are_called():
    scaled = torch.tensor([[[1.0, 5.0]], [[3.0, 2.0]]], dtype=torch.float64)
    assert POTENTIALS["difference"](scaled).tolist() == [[2, -3]]
    assert POTENTIALS["max"](scaled).tolist() == [[3, 5]]
    assert POTENTIALS["sum"](scaled).tolist() == [[4, 7]]
    assert POTENTIALS["difference"](scaled[:1]).tolist() == [[1, 5]]


def test_unknown_names():
    expected = "^potential: expected one of difference, max, sum or a function, got 'min'$"
    with pytest.raises(ValueError, match=expected):
        potential_named("min")
