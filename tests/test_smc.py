"""The particle filter against closed forms."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from glassflows import sample_transition
from glassflows.smc import filter as smc
from glassflows.smc.potentials import difference
from glassflows.smc.resampling import draw_uniforms, systematic
from glassflows.smc.weights import ess, log_mean, normalise


def uniforms(*values):
    return torch.tensor(values, dtype=torch.float64)


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


@pytest.mark.parametrize("u", [0.0, 0.3, 1 - 2**-32])
def test_offspring_counts(u):
    """Every particle has ⌊K W⌋ or ⌈K W⌉ children, one of weight zero none."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(50, 7, generator=generator, dtype=torch.float64)
    weights[:, [0, 3, 6]] = 0
    weights = weights / weights.sum(-1, keepdim=True)
    ancestors = systematic(weights.log(), torch.full((50,), u, dtype=torch.float64))
    counts = torch.nn.functional.one_hot(ancestors, 7).sum(1)
    assert (counts >= (7 * weights - 1e-9).floor()).all()
    assert (counts <= (7 * weights + 1e-9).ceil()).all()


def test_equal_weights_keep_every_particle():
    assert (
        systematic(torch.zeros(3, 8, dtype=torch.float64), uniforms(0.0, 0.5, 1 - 2**-32)).tolist() == [[*range(8)]] * 3
    )


def test_resampling_is_unbiased():
    weights = torch.tensor([[0.05, 0.5, 0.15, 0.3]], dtype=torch.float64)
    u = draw_uniforms([torch.Generator().manual_seed(0)] * 20_000)
    counts = torch.nn.functional.one_hot(systematic(weights.log().expand(20_000, -1), u), 4).sum(1).double()
    np.testing.assert_allclose(counts.mean(0), 4 * weights[0], atol=0.02)


def test_uniforms_come_from_each_groups_own_generator():
    one = draw_uniforms([torch.Generator().manual_seed(s) for s in (1, 2, 3)])
    assert torch.equal(one[1:2], draw_uniforms([torch.Generator().manual_seed(2)]))
    assert ((one >= 0) & (one < 1)).all()


# ---- filter ----------------------------------------------------------------------------------------------------------


def test_log_potentials_telescope():
    rewards = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total, previous = torch.zeros(2, 5), torch.zeros(2, 5)
    for r in rewards:
        total, previous = total + difference(r, previous, 3.0), r
    torch.testing.assert_close(total, 3 * rewards[-1], rtol=0, atol=1e-12)


def test_groups_do_not_meet():
    """One group degenerates and is resampled, the other carries its weights; an unequal weight is never lost."""
    rewards = torch.tensor([[9.0, 0, 0, 0], [0.1, 0, 0, 0]], dtype=torch.float64)
    state, info = smc.step(smc.init(2, 4), rewards, reward_scale=1, ess_threshold=0.5, uniforms=uniforms(0.5, 0.5))
    assert info.resampled.tolist() == [True, False]
    assert info.ancestors.tolist() == [[0, 0, 0, 0], [0, 1, 2, 3]]
    assert state.log_weights.tolist() == [[0, 0, 0, 0], [0.1, 0, 0, 0]]
    assert state.rewards.tolist() == [[9, 9, 9, 9], [0.1, 0, 0, 0]]


def test_zero_reward_scale_never_resamples():
    rewards = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state, info = smc.step(smc.init(3, 8), rewards, reward_scale=0, ess_threshold=1, uniforms=uniforms(0.1, 0.2, 0.3))
    assert info.ancestors.tolist() == [[*range(8)]] * 3
    assert torch.equal(state.log_weights, torch.zeros(3, 8, dtype=torch.float64))


def gaussian(x, t):
    """Denoiser of z ~ N(0, 1)."""
    return t * x / (t**2 + (1 - t) ** 2)


def steered_gaussian(groups, particles, seed, *, carry=True, ess_threshold=0.5, tilt=2.0):
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
            u = torch.rand(groups, generator=generator, dtype=torch.float64)
            state, info = smc.step(state, rewards, reward_scale=tilt, ess_threshold=ess_threshold, uniforms=u)
            x = x.view(groups, particles).gather(1, info.ancestors).view(-1, 1)
            if not carry:
                state = smc.FilterState(torch.zeros_like(state.log_weights), state.log_evidence, state.rewards)
        x = sample_transition(gaussian, x, t, t_next, num_steps=6, generator=generator)
    return x.view(groups, particles), smc.weigh(state, x.view(groups, particles), tilt)


@pytest.mark.parametrize("ess_threshold", [0.5, 1.0])
def test_tilted_gaussian(ess_threshold):
    means, evidences = [], []
    for seed in range(20):
        z, state = steered_gaussian(1, 2000, seed, ess_threshold=ess_threshold)
        means.append((normalise(state.log_weights).exp() * z).sum().item())
        evidences.append(smc.log_evidence(state).item())
    error = np.std(means) / math.sqrt(20)
    assert abs(np.mean(means) - 2) < 5 * error + 0.005  # 0.005: what 6 calls per transition leave
    assert error < 0.03
    assert np.mean(evidences) == pytest.approx(2, abs=0.03)


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
