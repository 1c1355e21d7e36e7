"""What a budget pays for: the ledger of the proposed call never exceeds it, and one particle more would."""

import math
import re
from collections import defaultdict
from dataclasses import replace

import pytest

import tiny
from glassflows import BestOfN, FeynmanKac, FeynmanKacSteerer, Halving, Ledger, Steerer
from glassflows.steering.budget import propose

STRATEGIES = {
    "plain": {},
    "late": {"start": 0.5},
    "ahead": {"look_ahead": 2, "look_ahead_samples": 2},
    "narrowing": {"widths": (4, 2, 1), "num_particles": 4},
    "narrowing, ahead": {"widths": (4, 2, 1), "num_particles": 4, "look_ahead": 1},
}


@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize(("budget", "steps"), [(60, 6), (97, 10), (100, 13)])
def test_the_call_keeps_to_the_budget(flux, options, budget, steps):
    plain = flux.steerer(num_transitions=None, **options)
    steerer = plain.for_budget(steps, network_calls=budget)
    spent = steerer(**flux.arguments(num_inference_steps=steps)).ledger.network_calls
    assert spent <= budget
    if "start" in options:  # whose window spares excursions, which a proposal does not know
        return
    shares = (4, 2, 1) if "widths" in options else (1,)
    away = options.get("look_ahead", 0) * options.get("look_ahead_samples", 1)
    proposed = propose(budget, steps, shares, away)
    assert spent == proposed.network_calls
    assert proposed.num_particles == steerer.num_particles
    narrowing = "widths" in options
    more = replace(steerer.strategy, widths=None)
    bigger = Steerer(
        flux.pipe, tiny.brightness, more, proposed.num_particles + 1, num_transitions=proposed.num_transitions
    )  # fmt: skip
    if not narrowing and not away:
        assert bigger(**flux.arguments(num_inference_steps=steps)).ledger.network_calls > budget
    assert plain.num_particles == 4  # left as it was


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
def test_transitions(steps, transitions):
    assert tiny.Toy(tiny.flux).steerer().for_budget(steps, network_calls=400).num_transitions == transitions


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
        ({"network_calls": 11}, "network_calls: expected at least 12, for 2 particles of a prompt, got 11"),
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
