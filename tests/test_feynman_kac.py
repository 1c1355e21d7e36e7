"""FeynmanKac in a steered call: when it scores, how much a reward counts, who is resampled, what particles weigh."""

import math
import re

import numpy as np
import pytest
import torch

import tiny
from glassflows import FeynmanKac
from glassflows.smc import resampling
from glassflows.smc.weights import ess, log_mean, normalise

PROMPTS = ["a cat", "a dog"]


# ---- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "transitions"),
    [
        ({}, (1, 2, 3, 4, 5)),
        ({"score_every": 2}, (1, 3, 5)),
        ({"start": 0.3, "stop": 0.7}, (2, 3, 4)),
        ({"start": 0.5, "stop": 0.5}, (3,)),  # both ends are within
        ({"start": 1}, ()),
    ],
)
def test_when_it_is_scored(flux, options, transitions):
    out = flux.steer(num_transitions=6, reward_scale=1, **options)
    assert out.transitions == transitions
    assert out.ledger.decodes == 4 * len(transitions)
    assert out.ledger.reward_calls == 4 * (len(transitions) + 1)  # the final images, too
    assert out.ledger.network_calls == 24


# ---- scales ----------------------------------------------------------------------------------------------------------


def test_schedules_are_followed(flux):
    """On the way too: without resampling the ESS is that of λ_k r_k, of a list, an array and a function."""
    scales = [2.0, 5.0, 8.0]
    for given in (scales, np.array(scales), torch.tensor(scales), lambda done: scales[round(3 * done) - 1]):
        out = flux.steer(reward_scale=given, ess_threshold=0)
        weights = torch.tensor(scales[:2], dtype=torch.float64)[:, None, None] * out.scored
        np.testing.assert_allclose(out.ess, ess(weights), rtol=1e-5)
        assert out.reward_scale.tolist() == [8]


def test_automatic_scale(flux):
    """Chosen for each prompt at the first scoring: half of the particles stay effective; kept, and told."""
    out = flux.steer(PROMPTS, num_particles=6, reward_scale="auto", ess_threshold=0)
    np.testing.assert_allclose(out.ess[0], 3.0, rtol=1e-6)
    np.testing.assert_allclose(ess(out.reward_scale[:, None] * out.scored[0]), 3.0, rtol=1e-6)
    torch.testing.assert_close(out.log_weights, normalise(out.reward_scale[:, None] * out.rewards))
    constant = flux.steer(reward=lambda images, prompts: torch.ones(4), reward_scale="auto", ess_threshold=1)
    assert constant.reward_scale.tolist() == [0.0]
    assert not constant.resampled.any()


@pytest.mark.parametrize("particles", [2, 4])
def test_the_automatic_scale_steers_few_and_tied_particles(flux, particles):
    given = {"num_particles": particles, "reward": lambda images, prompts: [0.0, 1.0, 1.0, 1.0][:particles]}
    assert (flux.steer(reward_scale="auto", **given).reward_scale > 0).all()
    with pytest.warns(UserWarning, match=r"About -\d[\d.e+]* would leave half of the particles effective\.$"):
        flux.steer(reward_scale=-1e-6, **given)


def test_a_scale_that_does_nothing_is_noticed_once(flux):
    """And the one that is suggested leaves half of the particles."""
    with pytest.warns(UserWarning, match=r"^reward_scale=1e-06 leaves") as caught:
        out = flux.steer(reward_scale=1e-6)
    assert len(out.transitions) == 2
    assert len(caught) == 1
    said = re.match(
        r"reward_scale=1e-06 leaves the weights within 0\.\d% of uniform: steering does next to nothing\. "
        r"About ([\d.e+-]+) would leave half of the particles effective\.$",
        str(caught[0].message),
    )
    assert ess(float(said[1]) * out.scored[0]).item() == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize(
    ("scale", "shown"),
    [(lambda done: math.nan if done == 1 else 1.0, "nan"), (lambda done: math.nan, "nan"), (1e308, "1e+308")],
    ids=["at the end", "throughout", "overflow"],
)
def test_scales_that_are_no_numbers(flux, scale, shown):
    expected = rf"^reward_scale=\[{re.escape(shown)}\] times rewards \[\[\d.*\]\] is not finite; expected numbers"
    with pytest.raises(ValueError, match=expected):
        flux.steer(reward_scale=scale)


# ---- potentials and weights ------------------------------------------------------------------------------------------


def test_particles_descend_from_their_ancestors(flux):
    """What is scored at one transition is resampled as recorded, and weights follow the filter's arithmetic."""
    scored = []

    def reward(images, prompts):
        scored.append(tiny.brightness(images, prompts).double().view(2, 4))
        return scored[-1].flatten()

    out = flux.steer(PROMPTS, reward=reward, reward_scale=1, ess_threshold=0.9)
    log_weights = torch.zeros(2, 4, dtype=torch.float64)
    evidence, before = torch.zeros(2, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    for rewards, ancestors, resampled in zip(scored[:-1], out.ancestors, out.resampled, strict=True):
        log_weights = log_weights + rewards - before
        assert torch.equal(resampled, ess(log_weights) < 3.6)
        evidence += torch.where(resampled, log_mean(log_weights), 0.0)
        log_weights = torch.where(resampled[:, None], 0.0, log_weights)
        before = rewards.gather(1, ancestors)
    log_weights = log_weights + scored[-1] - before
    torch.testing.assert_close(out.log_weights, normalise(log_weights))
    torch.testing.assert_close(out.log_evidence, evidence + log_mean(log_weights))
    torch.testing.assert_close(out.scored, torch.stack(scored[:-1]))


@pytest.mark.parametrize("potential", ["difference", "max", "sum", lambda scaled: 0.3 * scaled[-1]])
@pytest.mark.parametrize("scale", [1.0, [0.1, 0.5, 1.0], lambda done: done])
def test_weights_sum_to_the_final_reward(flux, potential, scale):
    """Without resampling the final weights are exp(λ r), whatever the potential and the schedule."""
    out = flux.steer(potential=potential, reward_scale=scale, ess_threshold=0)
    torch.testing.assert_close(out.log_weights, normalise(out.rewards))
    torch.testing.assert_close(out.log_evidence, log_mean(out.rewards))
    assert out.reward_scale.tolist() == [1.0]
    assert not out.resampled.any()


@pytest.mark.filterwarnings("ignore:.*scored no particles on the way:UserWarning")
def test_one_transition_is_best_of_n(flux):
    out = flux.steer(num_transitions=1)
    assert out.ancestors.shape == (0, 1, 4)
    torch.testing.assert_close(out.log_weights, (out.rewards - out.rewards.logsumexp(-1, keepdim=True)))


def test_potentials_that_are_no_numbers(flux):
    message = "potential returned [[inf, inf, inf, inf]]; expected finite values, one per particle, of shape (1, 4)"
    with pytest.raises(ValueError, match=re.escape(message)):
        flux.steer(potential=lambda scaled: scaled[-1] / 0)


# ---- resampling ------------------------------------------------------------------------------------------------------


def test_the_scheme_that_was_named_is_used(flux, monkeypatch):
    def last(log_weights, generators):
        return torch.full(log_weights.shape, 3)

    monkeypatch.setitem(resampling.RESAMPLING, "ssp", last)
    out = flux.steer(resampling="ssp", ess_threshold=1, reward_scale=1)
    assert (out.ancestors == 3).all()


@pytest.mark.parametrize("scale", [1.0, 1e4, -3.0, "auto", [0.1, 1.0, 10.0]])
@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_a_prompt_of_constant_reward_is_never_resampled(flux, scale, potential):
    def reward(images, prompts):
        bright = tiny.brightness(images, prompts)
        return [0.1 if prompt == "a dog" else float(score) for prompt, score in zip(prompts, bright, strict=True)]

    out = flux.steer(PROMPTS, reward=reward, reward_scale=scale, potential=potential, ess_threshold=1.0)
    assert not out.resampled[:, 1].any()
    assert out.resampled[:, 0].any()
    assert (out.ancestors[:, 1] == torch.arange(4)).all()
    torch.testing.assert_close(out.log_weights[1].exp(), torch.full((4,), 0.25, dtype=torch.float64))


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "start, stop: expected fractions 0 ≤ start ≤ stop ≤ 1, got 0.8, 0.2": {"start": 0.8, "stop": 0.2},
    "score_every: expected at least 1, got 0": {"score_every": 0},
    "potential: expected one of difference, max, sum or a function, got 'min'": {"potential": "min"},
    "resampling: expected one of systematic, stratified, residual, ssp, multinomial, got 'best'": {
        "resampling": "best"
    },
    "reward_scale: expected finite numbers, got nan": {"reward_scale": float("nan")},
    "reward_scale: expected a number, a list, a function or \"auto\", got 'large'": {"reward_scale": "large"},
    "ess_threshold: expected a fraction of num_particles in [0, 1], got 4": {"ess_threshold": 4},
}


def test_bad_input(flux):
    for message, options in BAD.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            FeynmanKac(**options)
        with pytest.raises(ValueError, match=re.escape(message)):
            flux.steerer(**options)
    with pytest.raises(ValueError, match="reward_scale: expected one per transition, 3, got a list of 2"):
        flux.steer(reward_scale=[1.0, 2.0])
