"""Strategies: who goes on, seen rewards alone; and a steerer with each of them."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import tiny
from glassflows import BeamSearch, BestOfN, FeynmanKac, FeynmanKacSteerer, MicroBatches, Steerer
from glassflows.flow.noise import RectifiedFlow
from glassflows.scheduler import Boundary
from glassflows.smc.weights import log_mean, normalise
from glassflows.steering import Decision, Outcome

CALL = tiny.FLUX_CALL | {"num_inference_steps": 6, "output_type": "np"}
REWARDS = torch.tensor([[3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0], [2.0, 7.0, 1.0, 8.0, 2.0, 8.0, 1.0, 8.0]]).double()


def at(index, total=5):
    return Boundary(index, total, RectifiedFlow().level(index / total))


def generators(number=2):
    return [tiny.seeded(i) for i in range(number)]


def brightness(images, prompts):
    return 1000 * images.mean((1, 2, 3))


def steer(strategy, prompt=("a cat", "a dog"), **options):
    steerer = Steerer(tiny.flux(), brightness, strategy, 4, num_transitions=3, **options)
    return steerer(list(prompt), generator=tiny.seeded(), **CALL)


def test_steps_change_no_state():
    """A state can be used twice: same rewards and generators, same decision."""
    for strategy in (FeynmanKac(ess_threshold=1.0), FeynmanKac(reward_scale="auto"), BestOfN(), BeamSearch()):
        state = strategy.init(2, 8)
        (one, first), (two, second) = (strategy.step(state, REWARDS, at(1), generators()) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))
        assert first.alive == second.alive
        outcomes = [strategy.finish(end, REWARDS, 5) for end in (one, two)]
        assert all(torch.equal(a, b) or (a.isnan() & b.isnan()).all() for a, b in zip(*outcomes, strict=True))


def test_strategies_are_frozen():
    for strategy in (FeynmanKac(), BestOfN(), BeamSearch()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            strategy.reward_scale = 3.0


def test_beam_search_keeps_the_best():
    """Of ties the first; with equally many children each, in the order of their slots."""
    _, decision = BeamSearch(width=2).step(None, REWARDS, at(1), generators())
    assert decision.ancestors.tolist() == [[5, 5, 5, 5, 7, 7, 7, 7], [3, 3, 3, 3, 5, 5, 5, 5]]
    assert decision.resampled.tolist() == [True, True]
    assert decision.ess.tolist() == [2.0, 2.0]
    _, everyone = BeamSearch(width=8).step(None, REWARDS, at(1), generators())
    assert torch.equal(everyone.ancestors, torch.arange(8).expand(2, 8))
    assert not everyone.resampled.any()


def test_beam_search_through_a_pipeline():
    out = steer(BeamSearch(width=2))
    assert out.strategy == "BeamSearch"
    assert out.transitions == (1, 2)
    for rewards, ancestors in zip(out.scored, out.ancestors, strict=True):
        best = rewards.topk(2).indices.sort(-1).values
        assert torch.equal(ancestors, best.repeat_interleave(2, 1))
    torch.testing.assert_close(out.log_weights, torch.full((2, 4), -math.log(4), dtype=torch.float64))
    assert out.log_evidence.isnan().all()
    assert out.reward_scale.isnan().all()
    assert (out.image_rewards.view(2, 4).diff() <= 0).all()


def test_the_width_divides_the_particles():
    with pytest.raises(ValueError, match="width: expected a divisor of num_particles=8, got 3"):
        Steerer(tiny.flux(), brightness, BeamSearch(width=3))
    with pytest.raises(ValueError, match="width: expected at least 1, got 0"):
        BeamSearch(width=0)


def test_best_of_n_scores_the_end_alone():
    """Its particles are those of the filter that never moves any, with the same weights."""
    out, filtered = steer(BestOfN(reward_scale=0.5)), steer(FeynmanKac(reward_scale=0.5, ess_threshold=0))
    assert out.ledger.reward_calls == 8
    assert out.ledger.decodes == 0
    assert out.transitions == ()
    assert np.array_equal(out.images, filtered.images)
    torch.testing.assert_close(out.log_weights, normalise(0.5 * out.rewards))
    torch.testing.assert_close(out.log_evidence, log_mean(0.5 * out.rewards))
    torch.testing.assert_close(out.log_weights, filtered.log_weights)


@pytest.mark.parametrize("strategy", [FeynmanKac(), BestOfN()])
def test_a_scale_left_open_is_that_of_the_reward(strategy):
    class Documented:
        reward_scale = 7.0

        def __call__(self, images, prompts):
            return brightness(images, prompts)

    assert Steerer(tiny.flux(), Documented(), strategy).strategy.reward_scale == 7
    assert Steerer(tiny.flux(), brightness, strategy).strategy.reward_scale == 1
    given = dataclasses.replace(strategy, reward_scale=2.0)
    assert Steerer(tiny.flux(), Documented(), given).strategy.reward_scale == 2


def test_a_strategy_of_ones_own():
    """Each slot keeps the better of itself and its neighbour: nothing of the library is told of it."""

    class Neighbours:
        def due(self, at):
            return True

        def init(self, groups, particles):
            return 0

        def step(self, state, rewards, at, generators):
            slots = torch.arange(rewards.shape[1]).expand_as(rewards)
            ancestors = torch.where(rewards >= rewards.roll(1, 1), slots, slots.roll(1, 1))
            moved = (ancestors != slots).any(1)
            return state + 1, Decision(ancestors, moved, torch.full((len(rewards),), 4.0))

        def finish(self, state, rewards, total):
            assert state == 2
            return Outcome.without_law(rewards)

    out = steer(Neighbours())
    assert out.strategy == "Neighbours"
    for rewards, ancestors in zip(out.scored, out.ancestors, strict=True):
        kept = rewards.gather(1, ancestors)
        assert torch.equal(kept, torch.maximum(rewards, rewards.roll(1, 1)))
    assert out.recipe["strategy"] == "Neighbours"


def test_the_flat_options_are_the_fields():
    """One and the same steerer, by either name; its options can be read, and set, by both."""
    flat = FeynmanKacSteerer(
        tiny.flux(), brightness, 4, num_transitions=3, potential="max", ess_threshold=0.9, reward_scale=2.0,
        particle_batch_size=3, decode_batch_size=2, reward_batch_size=1, previews=True,
    )  # fmt: skip
    strategy = FeynmanKac(potential="max", ess_threshold=0.9, reward_scale=2.0)
    parts = Steerer(
        tiny.flux(), brightness, strategy, 4,
        num_transitions=3, batches=MicroBatches(network=3, decode=2, reward=1), previews=True,
    )  # fmt: skip
    assert flat.strategy == parts.strategy
    assert flat.batches == parts.batches
    results = [one("a cat", generator=tiny.seeded(), **CALL) for one in (flat, parts)]
    assert np.array_equal(results[0].images, results[1].images)
    assert torch.equal(results[0].log_weights, results[1].log_weights)
    assert results[0].recipe["steerer"] == results[1].recipe["steerer"]
    assert (flat.potential, flat.particle_batch_size, flat.reward_scale) == ("max", 3, 2.0)
    flat.ess_threshold, flat.decode_batch_size = 0.5, 4
    assert (flat.strategy.ess_threshold, flat.batches.decode) == (0.5, 4)
    with pytest.raises(ValueError, match="ess_threshold: expected a fraction"):
        flat.ess_threshold = 3
    with pytest.raises(TypeError, match="ess_treshold"):
        FeynmanKacSteerer(tiny.flux(), brightness, ess_treshold=0.5)


def test_particles_given_for_the_strategy():
    with pytest.raises(ValueError, match=r"strategy: expected a strategy such as FeynmanKac\(\), got 8"):
        Steerer(tiny.flux(), brightness, 8)


def test_a_scale_left_open_follows_another_reward():
    """Also after another option was set; one that was given stays."""

    class Documented:
        reward_scale = 7.0

        def __call__(self, images, prompts):
            return brightness(images, prompts)

    steerer = FeynmanKacSteerer(tiny.flux(), Documented())
    assert steerer.reward_scale == 7
    steerer.ess_threshold = 0.9
    steerer.reward = brightness
    assert (steerer.reward_scale, steerer.ess_threshold) == (1, 0.9)
    steerer.reward_scale = 3.0
    steerer.reward = Documented()
    assert steerer.reward_scale == 3
