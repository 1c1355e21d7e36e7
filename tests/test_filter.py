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
from glassflows.smc.resampling import RESAMPLING, systematic
from glassflows.smc.weights import ess, normalise
from oracles import gaussian


def generators(number, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(number)]


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


FILTERS = {
    "default": {},
    "always": {"ess_threshold": 1.0},
    "maximum": {"potential": POTENTIALS["max"], "tilt": 1.0},
    **{name: {"resampling": RESAMPLING[name]} for name in ("stratified", "residual", "ssp")},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
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


@pytest.mark.slow
def test_dropped_weights_are_noticed():
    means = []
    for seed in range(20):
        z, state = steered_gaussian(1, 2000, seed, carry=False)
        means.append((normalise(state.log_weights).exp() * z).sum().item())
    assert abs(np.mean(means) - 2) > 5 * np.std(means) / math.sqrt(20) + 0.005


@pytest.mark.slow
def test_evidence_is_unbiased():
    """E[Ẑ] = Z on the natural scale, with as few as 8 particles."""
    _, state = steered_gaussian(20_000, 8, seed=0, tilt=1.0)
    ratio = (smc.log_evidence(state) - 0.5).exp()
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / math.sqrt(20_000) + 0.005
