"""The particle filter against closed forms."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from glassflows import sample_transition
from glassflows.smc import filter as smc
from glassflows.smc.potentials import POTENTIALS, potential_named
from glassflows.smc.resampling import RESAMPLING, resampling_named, systematic
from glassflows.smc.weights import ess, log_mean, normalise


def generators(number, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(number)]


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_weights():
    log_weights = torch.tensor([[0.1, 0.2, 0.7], [1.0, 1.0, 1.0]], dtype=torch.float64).log()
    np.testing.assert_allclose(normalise(log_weights).exp().sum(-1), 1, atol=1e-12)
    np.testing.assert_allclose(ess(log_weights), [1 / (0.01 + 0.04 + 0.49), 3], atol=1e-12)
    np.testing.assert_allclose(log_mean(log_weights), [math.log(1 / 3), 0], atol=1e-12)


def test_extreme_weights_stay_finite():
    log_weights = torch.tensor([[1e4, -1e4, 0.0]], dtype=torch.float64)
    assert ess(log_weights).item() == pytest.approx(1)
    assert log_mean(log_weights).item() == pytest.approx(1e4 - math.log(3))


# ---- resampling ------------------------------------------------------------------------------------------------------

EXACT = ["systematic", "ssp"]  # ⌊K W⌋ or ⌈K W⌉ children


def hard_weights():
    """Return weights (50, 7) with zeros, of 1e-300, equal ones and one that has all."""
    weights = torch.rand(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights[:, [0, 3, 6]] = 0
    weights[0], weights[1], weights[2] = 1e-300, 1.0, torch.eye(7, dtype=torch.float64)[6]
    weights[0, 2] = 1.0
    return weights / weights.sum(-1, keepdim=True)


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
    with pytest.raises(ValueError, match="resampling: expected one of systematic, .*, got 'best'"):
        resampling_named("best")
    with pytest.raises(ValueError, match="potential: expected one of difference, max, sum or a function, got 'min'"):
        potential_named("min")


# ---- filter ----------------------------------------------------------------------------------------------------------


def square(scaled):
    """A user's own potential, which does not telescope by itself."""
    return scaled[-1] ** 2


@pytest.mark.parametrize("potential", [*POTENTIALS, square])
@pytest.mark.parametrize("ess_threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scales", [[3.0] * 5, [0.1, 0.5, 1.0, 2.0, 3.0]])
def test_log_potentials_sum_to_the_final_reward(potential, ess_threshold, scales):
    """Along every surviving ancestry, with every gate and schedule, with and without a last resampling."""
    rewards = torch.randn(5, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state, given = smc.init(2, 6), generators(2)
    paid = torch.zeros(2, 6, dtype=torch.float64)
    for scale, r in zip(scales[:-1], rewards[:-1], strict=True):
        state, info = smc.step(
            state, scale * r, ess_threshold=ess_threshold, generators=given, potential=potential_named(potential)
        )
        paid = (paid + info.log_potential).gather(1, info.ancestors)
    last = smc.finish(state, scales[-1] * rewards[-1])
    paid = paid + (last.log_weights - state.log_weights)
    torch.testing.assert_close(paid, 3 * rewards[-1], rtol=0, atol=1e-10)
    ancestors = systematic(last.log_weights, given)
    torch.testing.assert_close(paid.gather(1, ancestors), 3 * rewards[-1].gather(1, ancestors), rtol=0, atol=1e-10)


def test_potentials_are_what_they_are_called():
    scaled = torch.tensor([[[1.0, 5.0]], [[3.0, 2.0]]], dtype=torch.float64)
    assert POTENTIALS["difference"](scaled).tolist() == [[2, -3]]
    assert POTENTIALS["max"](scaled).tolist() == [[3, 5]]
    assert POTENTIALS["sum"](scaled).tolist() == [[4, 7]]
    assert POTENTIALS["difference"](scaled[:1]).tolist() == [[1, 5]]


def test_groups_do_not_meet():
    """One group degenerates and is resampled, the other carries its weights; an unequal weight is never lost."""
    rewards = torch.tensor([[9.0, 0, 0, 0], [0.1, 0, 0, 0]], dtype=torch.float64)
    given = generators(2)
    state, info = smc.step(smc.init(2, 4), rewards, ess_threshold=0.5, generators=given)
    assert info.resampled.tolist() == [True, False]
    assert info.ancestors.tolist() == [[0, 0, 0, 0], [0, 1, 2, 3]]
    assert state.log_weights.tolist() == [[0, 0, 0, 0], [0.1, 0, 0, 0]]
    assert state.scaled.tolist() == [[[9, 9, 9, 9], [0.1, 0, 0, 0]]]
    assert torch.equal(given[1].get_state(), generators(2)[1].get_state())  # nothing drawn that is not used


def test_equal_weights_are_never_resampled():
    for rewards in (torch.zeros(3, 7), torch.full((3, 7), 0.1)):
        _, info = smc.step(smc.init(3, 7), rewards.double(), ess_threshold=1, generators=generators(3))
        assert not info.resampled.any()


def test_scale_for_ess():
    rewards = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards = rewards * torch.tensor([[1e-3], [1.0], [1e4], [0.0]])
    scales = smc.scale_for_ess(rewards, 0.5)
    np.testing.assert_allclose(ess(scales[:3, None] * rewards[:3]), 4.5, rtol=1e-9)
    assert scales[3].isnan()


def test_scale_for_ess_where_the_best_are_tied():
    """Half-way between what no scale gets below and all: of two particles, and of ties at the top."""
    for rewards, expected in (([[0.0, 1.0]], 1.5), ([[1.0, 1.0, 0.0, 0.0]], 3.0), ([[1.0, 1.0, 1.0, 0.0]], 3.5)):
        tied = torch.tensor(rewards, dtype=torch.float64)
        np.testing.assert_allclose(ess(smc.scale_for_ess(tied, 0.5)[:, None] * tied), expected, rtol=1e-9)


def test_a_gate_just_met_does_not_resample():
    """Rewards of the scale that leaves half of the particles, whatever constant is added to them."""
    rewards = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = smc.scale_for_ess(rewards, 0.5)[:, None]
    for shift in (0.0, 1e6, -1e6):
        state, options = smc.init(64, 8), {"generators": [torch.Generator()] * 64, "ess_threshold": 0.5}
        assert not smc.step(state, scale * (rewards + shift), **options)[1].resampled.any()


def test_a_potential_may_write_into_its_argument():
    def spoiling(scaled):
        scaled[-1] -= scaled[:-1].sum(0)
        return scaled[-1].clone()

    state, options = smc.init(1, 4), {"generators": [torch.Generator()], "ess_threshold": 0.0}
    rewards = torch.randn(1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state, _ = smc.step(state, rewards, potential=spoiling, **options)
    assert torch.equal(state.scaled[0], rewards)


def gaussian(x, t):
    """Denoiser of z ~ N(0, 1)."""
    return t * x / (t**2 + (1 - t) ** 2)


def steered_gaussian(groups, particles, seed, *, carry=True, ess_threshold=0.5, tilt=2.0, **options):
    """Steer N(0, 1) by r(z) = z, λ_r = 2: the target is N(2, 1) and log E[exp(2 z)] = 2. Returns (z, state).

    `carry=False` is the deliberately wrong filter that throws the weights of skipped resamplings away.
    """
    generator = torch.Generator().manual_seed(seed)
    times = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    x = torch.randn(groups * particles, 1, generator=generator, dtype=torch.float64)
    state = smc.init(groups, particles)
    for k, (t, t_next) in enumerate(pairwise(times)):
        if k > 0:
            rewards = gaussian(x, t).view(groups, particles)
            state, info = smc.step(
                state, tilt * rewards, ess_threshold=ess_threshold, generators=[generator] * groups, **options
            )
            x = x.view(groups, particles).gather(1, info.ancestors).view(-1, 1)
            if not carry:
                state = replace(state, log_weights=torch.zeros_like(state.log_weights))
        x = sample_transition(gaussian, x, t, t_next, num_steps=6, generator=generator)
    return x.view(groups, particles), smc.finish(state, tilt * x.view(groups, particles))


FILTERS = [{}, {"ess_threshold": 1.0}, {"potential": POTENTIALS["max"], "tilt": 1.0}]
FILTERS += [{"resampling": RESAMPLING[name]} for name in ("stratified", "residual", "ssp")]


FILTER_NAMES = ["default", "always", "maximum", "stratified", "residual", "ssp"]


@pytest.mark.parametrize("options", FILTERS, ids=FILTER_NAMES)
def test_tilted_gaussian(options):
    tilt = options.get("tilt", 2.0)
    means, evidences = [], []
    for seed in range(20):
        z, state = steered_gaussian(1, 2000, seed, **options)
        means.append((normalise(state.log_weights).exp() * z).sum().item())
        evidences.append(smc.log_evidence(state).item())
    error = np.std(means) / math.sqrt(20)
    assert abs(np.mean(means) - tilt) < 5 * error + 0.005  # 0.005: what 6 calls per transition leave
    assert error < 0.03
    assert abs(np.mean(evidences) - tilt**2 / 2) < 5 * np.std(evidences) / math.sqrt(20) + 0.01


def test_dropped_weights_are_noticed():
    means = []
    for seed in range(20):
        z, state = steered_gaussian(1, 2000, seed, carry=False)
        means.append((normalise(state.log_weights).exp() * z).sum().item())
    assert abs(np.mean(means) - 2) > 5 * np.std(means) / math.sqrt(20) + 0.005


def test_evidence_is_unbiased():
    """E[Ẑ] = Z on the natural scale, with as few as 8 particles."""
    _, state = steered_gaussian(20_000, 8, seed=0, tilt=1.0)
    ratio = (smc.log_evidence(state) - 0.5).exp()
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / math.sqrt(20_000) + 0.005
