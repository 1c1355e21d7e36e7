"""Resampling schemes: how many children a particle has, on average and at most."""

import math

import pytest
import torch

from glassflows.smc.resampling import RESAMPLING, resampling_named

EXACT = ["systematic", "ssp"]  # ⌊K W⌋ or ⌈K W⌉ children


def generators(number, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(number)]


def hard_weights():
    """Return weights (50, 7) with zeros, of 1e-300, equal ones and one that has all."""
    weights = torch.rand(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights[:, [0, 3, 6]] = 0
    weights[0], weights[1], weights[2] = 1e-300, 1.0, torch.eye(7, dtype=torch.float64)[6]
    weights[0, 2] = 1.0
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESAMPLING)
def test_offspring(name):
    """Unbiased, K children in all, in order, none of weight zero; counts as near K W as each scheme promises."""
    weights, repeats = hard_weights(), 800
    given, total = generators(50), torch.zeros(50, 7, dtype=torch.float64)
    for _ in range(repeats):
        ancestors = RESAMPLING[name](weights.log(), given)
        counts = torch.nn.functional.one_hot(ancestors, 7).sum(1).double()
        total += counts
        assert (ancestors.diff() >= 0).all()
        assert (counts.sum(-1) == 7).all()
        assert (counts[weights == 0] == 0).all()
        if name in (*EXACT, "residual"):
            assert (counts >= (7 * weights + 1e-9).floor()).all()
        if name in EXACT:
            assert (counts <= (7 * weights - 1e-9).ceil()).all()
        if name == "stratified":
            assert ((counts - 7 * weights).abs() < 2).all()
    scatter = (7 * weights * (1 - weights)).sqrt() / math.sqrt(repeats)  # of the multinomial, the widest
    assert ((total / repeats - 7 * weights).abs() <= 5 * scatter + 1e-9).all()


@pytest.mark.parametrize("name", [*EXACT, "stratified", "residual"])
def test_equal_weights_keep_every_particle(name):
    assert RESAMPLING[name](torch.zeros(3, 8, dtype=torch.float64), generators(3)).tolist() == [[*range(8)]] * 3


def test_multinomial_does_not():
    """Of 8 equal weights 8 (1 − (7/8)⁸) = 5.25 particles are kept."""
    log_weights = torch.zeros(4000, 8, dtype=torch.float64)
    ancestors = RESAMPLING["multinomial"](log_weights, generators(4000))
    kept = (torch.nn.functional.one_hot(ancestors, 8).sum(1) > 0).sum(-1).double()
    assert kept.mean() == pytest.approx(8 * (1 - (7 / 8) ** 8), abs=0.08)


def test_groups_draw_from_their_own_generators():
    log_weights = hard_weights()[3:6].log()
    for scheme in RESAMPLING.values():
        together = scheme(log_weights, generators(3))
        assert torch.equal(together[1:2], scheme(log_weights[1:2], generators(1, seed=1)))


def test_unknown_names():
    expected = "^resampling: expected one of systematic, stratified, residual, ssp, multinomial, got 'best'$"
    with pytest.raises(ValueError, match=expected):
        resampling_named("best")
