"""What a budget pays for: the ledger of the proposed call never exceeds it, and one particle more would."""

import math
import re
from collections import defaultdict
from copy import copy
from dataclasses import replace

import pytest

import tiny
from glassflows import BeamSearch, BestOfN, FeynmanKac, FeynmanKacSteerer, Halving, Ledger, Steerer

pytestmark = pytest.mark.slow

STRATEGIES = {
    "plain": {},
    "late": {"start": 0.5},
    "ahead": {"look_ahead": 2, "look_ahead_samples": 2},
    "narrowing": {"widths": (4, 2, 1), "num_particles": 4},
    "narrowing, ahead": {"widths": (4, 2, 1), "num_particles": 4, "look_ahead": 1},
}


@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize(
    ("budget", "steps", "transitions"), [(60, 6, None), (97, 10, None), (100, 13, None), (100, 5, 5), (100, 6, 4)]
)
def test_the_call_keeps_to_the_budget(flux, options, budget, steps, transitions):
    plain = flux.steerer(num_transitions=transitions, **options)
    steerer = plain.for_budget(steps, network_calls=budget)
    spent = steerer(**flux.arguments(num_inference_steps=steps)).ledger.network_calls
    assert spent <= budget
    more = copy(steerer)
    more.num_particles += 1
    if "widths" in options:
        more.strategy = replace(steerer.strategy, widths=tuple(width + 1 for width in steerer.strategy.widths))
    assert more(**flux.arguments(num_inference_steps=steps)).ledger.network_calls > budget
    assert plain.num_particles == 4  # left as it was


@pytest.mark.parametrize(("budget", "steps", "transitions"), [(100, 6, 3), (100, 5, 5), (160, 8, 5)])
def test_halving_drops_without_noise(flux, budget, steps, transitions):
    """Its parts are split evenly, those of steering only where fresh noise follows."""
    plain = Steerer(flux.pipe, tiny.brightness, Halving((4, 2, 1)), 4, num_transitions=transitions)
    steerer = plain.for_budget(steps, network_calls=budget)
    spent = steerer(**flux.arguments(num_inference_steps=steps)).ledger.network_calls
    assert budget - 2 * steps < spent <= budget


def test_two_prompts_share_it(flux):
    steerer = flux.steerer().for_budget(6, network_calls=100, num_prompts=2)
    assert steerer.num_particles == 8
    assert steerer(**flux.arguments(["a cat", "a dog"])).ledger.network_calls == 96


def test_seconds():
    """What an earlier call took for each network call, all else included."""
    ledger = Ledger(240, 32, 40, defaultdict(float, total=12.0, network=9.0))
    steerer = tiny.Toy(tiny.flux).steerer().for_budget(20, seconds=10.0, ledger=ledger)
    assert steerer.num_particles == 10  # 200 calls


@pytest.mark.parametrize(("steps", "transitions"), [(1, 1), (4, 2), (7, 3), (10, 5), (50, 5)])
def test_transitions(flux, steps, transitions):
    free = flux.steerer(num_transitions=None)
    assert free.for_budget(steps, network_calls=400).num_transitions == transitions
    assert flux.steerer(num_transitions=4).for_budget(10, network_calls=400).num_transitions == 4


def test_transitions_of_the_strategy(flux):
    """A list of scales and a calibration name them: the proposal runs."""
    listed = flux.steerer(num_transitions=None, reward_scale=[0.1, 0.2, 0.3]).for_budget(6, network_calls=60)
    assert listed.num_transitions == 3
    assert listed(**flux.arguments()).ledger.network_calls == 60
    steerer = flux.steerer(num_transitions=3, reward_scale=1.0)
    steerer.calibrate(**flux.arguments(["a cat", "a dog", "a cow", "a pig"]))
    steerer.num_transitions = None
    assert steerer.for_budget(6, network_calls=60)(**flux.arguments()).ledger.network_calls == 60


def test_strategies_that_cannot_do_with_any_number(flux):
    steerer = Steerer(flux.pipe, tiny.brightness, BeamSearch(3), 6, num_transitions=3).for_budget(6, network_calls=50)
    assert steerer.num_particles == 6
    with pytest.raises(ValueError, match="for_budget: expected enough for 2 particles"):
        Steerer(flux.pipe, tiny.brightness, BeamSearch(9), 9).for_budget(6, network_calls=50)


def test_more_widths_than_transitions(flux):
    with pytest.raises(ValueError, match="widths: expected at most 2"):
        flux.steerer(num_transitions=None, num_particles=16, widths=(16, 8, 4)).for_budget(4, network_calls=100)


@pytest.mark.parametrize(
    "strategy", [BestOfN(), FeynmanKac(widths=(8, 4, 2)), Halving((8, 4, 2)), Halving((6, 3))], ids=str
)
def test_any_strategy(flux, strategy):
    number = getattr(strategy, "widths", (8,))[0]
    steerer = Steerer(flux.pipe, tiny.brightness, strategy, number).for_budget(6, network_calls=50)
    assert isinstance(steerer.strategy, type(strategy))
    out = steerer(**flux.arguments())
    assert 0 < out.ledger.network_calls <= 50
    widths = getattr(steerer.strategy, "widths", None)
    if widths:
        assert widths[0] == steerer.num_particles
        ratios = [width / widths[0] for width in widths]
        assert ratios == pytest.approx([width / strategy.widths[0] for width in strategy.widths], abs=0.51 / widths[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "expected network_calls="),
        ({"network_calls": 100, "seconds": 3.0}, "expected network_calls="),
        ({"seconds": 3.0}, "expected network_calls="),
        ({"network_calls": 11}, "expected enough for 2 particles of each of 1 prompt(s) in 6 steps"),
        ({"seconds": 0.1, "ledger": Ledger(240, seconds={"total": 12.0})}, "got seconds=0.1, which pays for 2 network"),
        ({"network_calls": 100.0}, "network_calls: expected a whole number"),
        ({"seconds": 1.0, "ledger": Ledger()}, "ledger: expected that of an earlier call"),
        ({"seconds": math.nan, "ledger": Ledger()}, "seconds: expected a number above 0"),
    ],
    ids=str,
)
def test_refusals(flux, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        flux.steerer().for_budget(6, **given)


def test_subclasses_stay_what_they_are(flux):
    steerer = flux.steerer(reward_scale=3.0, ess_threshold=0.7).for_budget(6, network_calls=100)
    assert type(steerer) is FeynmanKacSteerer
    assert (steerer.reward_scale, steerer.ess_threshold, steerer.num_particles) == (3.0, 0.7, 16)
