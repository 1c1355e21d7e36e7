"""A word where steering does nothing, or all at once; at the line that called."""

import inspect
import re
import warnings

import numpy as np
import pytest
import torch

import tiny
from glassflows import BeamSearch, BestOfN, FeynmanKac, Steerer
from glassflows.flow.noise import RectifiedFlow
from glassflows.scheduler import Boundary
from glassflows.smc.weights import ess

SPREAD = [0.0, 1.0, 2.0, 3.0]


def said(function):
    """Return the warnings of a function."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [one for one in caught if "Feynman" in str(one.message) or "reward_scale" in str(one.message)
            or "Beam" in str(one.message)]  # fmt: skip


def scores(values):
    return lambda images, prompts: values


# ---- no scoring ------------------------------------------------------------------------------------------------------

UNSCORED = {
    "one transition": {"num_transitions": 1},
    "one step": {"num_inference_steps": 1},
    "a window between boundaries": {"start": 0.4, "stop": 0.6},
    "a window before": {"stop": 0.2},
    "a window after": {"start": 0.9},
}


@pytest.mark.parametrize("case", UNSCORED)
def test_a_filter_that_scores_nothing_says_so(flux, case):
    (warning,) = said(lambda: flux.steer(**UNSCORED[case]))
    number = 1 if case.startswith("one") else 3
    assert re.match(
        rf"FeynmanKac\(.*\) scored no particles on the way, and moved none: of {number} transition\(s\)",
        str(warning.message),
    )


@pytest.mark.parametrize("options", [{}, {"start": 0.3, "stop": 0.4}, {"score_every": 5}])
def test_a_filter_that_scores_once_does_not(flux, options):
    assert said(lambda: flux.steer(reward=scores(SPREAD), **options)) == []


@pytest.mark.parametrize("options", [{"ess_threshold": 0, "num_transitions": 1}, {"start": 1}])
def test_a_filter_that_is_not_to_move_says_nothing(flux, options):
    """With a threshold of 0, or if it is to score the end alone."""
    assert said(lambda: flux.steer(**options)) == []


@pytest.mark.parametrize(("strategy", "number"), [(BeamSearch(), 1), (BestOfN(), 0)])
def test_searches(flux, strategy, number):
    """A beam without a boundary is no search; the best of n is what it says."""
    steerer = Steerer(flux.pipe, tiny.brightness, strategy, 4, num_transitions=1)
    assert len(said(lambda: steerer(**flux.arguments()))) == number
    steerer.num_transitions = 3
    assert said(lambda: steerer(**flux.arguments())) == []


def test_a_beam_where_nothing_random_follows(flux):
    """Two calls in two transitions: what would be copied at the second stays a copy."""
    steerer = Steerer(flux.pipe, tiny.brightness, BeamSearch(), 4, num_transitions=2)
    assert len(said(lambda: steerer(**flux.arguments(num_inference_steps=2)))) == 1


def test_an_interrupted_run_says_nothing(flux):
    def stop(pipe, i, t, tensors):
        pipe._interrupt = True
        return tensors

    assert said(lambda: flux.steer(callback_on_step_end=stop)) == []


# ---- weights ---------------------------------------------------------------------------------------------------------


def suggested(warning):
    return float(re.search(r"About ([\d.e+-]+) would leave half of the particles effective\.$", warning)[1])


@pytest.mark.parametrize("scale", [100.0, -100.0])
def test_weights_that_collapse_are_noticed_once(flux, scale):
    """And the scale that is suggested leaves half."""
    (warning,) = said(lambda: flux.steer(reward=scores(SPREAD), reward_scale=scale))
    text = str(warning.message)
    assert text.startswith(f"reward_scale={scale:g} leaves one of 4 particles nearly all the weight at the first")
    assert ess(suggested(text) * torch.tensor([SPREAD]).double()).item() == pytest.approx(2, rel=0.02)
    assert np.sign(suggested(text)) == np.sign(scale)


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (SPREAD, {"reward_scale": 2.0}),  # 1.3 of 4: uneven, as a filter may well be
        ([0.0, 3.0, 3.0, 3.0], {"reward_scale": 1e4}),  # three of four are the same
        ([1.0] * 4, {"reward_scale": 1e4}),
        (SPREAD, {"reward_scale": 100.0, "ess_threshold": 0}),  # nobody is lost
        (SPREAD, {"reward_scale": "auto"}),
        ([0.0, 1.0], {"reward_scale": 1e4, "num_particles": 2}),  # half of two is one
        (SPREAD, {"reward_scale": [1.0, 100.0, 100.0]}),  # a schedule that begins small
    ],
    ids=["uneven", "tied", "constant", "unmoved", "auto", "two", "tempered"],
)
def test_weights_that_do_not_collapse(flux, values, options):
    assert said(lambda: flux.steer(reward=scores(values), **options)) == []


def test_most_prompts_collapse(flux):
    """Warnings are of the most of them, not of one."""

    def steer(*spreads):
        values = [spread * one for spread in spreads for one in SPREAD]
        prompts = ["a cat", "a dog", "a red fox"]
        return said(lambda: flux.steer(prompts, reward=scores(values), reward_scale=1.0))

    assert steer(100, 1, 1) == []
    assert len(steer(100, 100, 1)) == 1


def test_flatness_is_judged_at_the_target(flux):
    """A schedule may begin with next to nothing; one that ends so is as flat as a number."""
    assert said(lambda: flux.steer(reward=scores(SPREAD), reward_scale=[1e-6, 0.5, 1.0])) == []
    assert said(lambda: flux.steer(reward=scores(SPREAD), reward_scale=lambda done: 0.0 if done < 1 else 1.0)) == []
    (warning,) = said(lambda: flux.steer(reward=scores(SPREAD), reward_scale=[1.0, 1.0, 1e-6]))
    assert str(warning.message).startswith("reward_scale=1e-06 leaves the weights within")
    assert ess(suggested(str(warning.message)) * torch.tensor([SPREAD]).double()).item() == pytest.approx(2, rel=0.02)


# ---- where it is said ------------------------------------------------------------------------------------------------


def line():
    """Return the line of the caller."""
    return inspect.currentframe().f_back.f_lineno


@pytest.mark.parametrize(
    "options",
    [{"reward_scale": 1e-6}, {"reward_scale": 100.0}, {"num_transitions": 1}],
    ids=["flat", "collapsed", "unscored"],
)
def test_warnings_point_at_the_call(toy, options):
    """In the user's file, through the pipeline and the library."""
    steerer = toy.steerer(reward=scores(SPREAD), **options)
    with pytest.warns(UserWarning, match="particle") as caught:
        steerer(**toy.arguments()), line()
    expected = line() - 1
    mine = [one for one in caught if "particle" in str(one.message)]
    assert [(one.filename, one.lineno) for one in mine] == [(__file__, expected)]


def test_warnings_of_a_steerer_within_a_reward_point_there(flux):
    inner = tiny.Toy(tiny.sd)
    steerer, lines = inner.steerer(reward=scores(SPREAD), reward_scale=1e-6), []

    def reward(images, prompts):
        steerer(**inner.arguments()), lines.append(line())
        return SPREAD

    with pytest.warns(UserWarning, match="next to nothing") as caught:
        flux.steer(reward=reward)
    assert {(one.filename, one.lineno) for one in caught} == {(__file__, lines[0])}


def test_a_strategy_alone_points_at_its_caller():
    strategy = FeynmanKac(reward_scale=1e-6)
    at = Boundary(1, 3, RectifiedFlow().level(0.5))
    with pytest.warns(UserWarning, match="next to nothing") as caught:
        strategy.step(strategy.init(1, 4), torch.tensor([SPREAD]).double(), at, [tiny.seeded()]), line()
    assert (caught[0].filename, caught[0].lineno) == (__file__, line() - 1)


# ---- a scale that is chosen ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[-1e308, 0.0, 1e308, 1.0], [0.0, 5e-324, 0.0, 0.0]], ids=["wide", "narrow"])
def test_a_spread_that_overflows_is_an_error(flux, values):
    """No scale is chosen for it, and least of all 0."""
    with pytest.raises(ValueError, match='^reward_scale="auto": expected rewards with differences between'):
        flux.steer(reward=scores(values), reward_scale="auto")


@pytest.mark.parametrize("spread", [1e300, 1e-280])
def test_spreads_that_do_not(flux, spread):
    out = flux.steer(reward=scores([spread * one for one in SPREAD]), reward_scale="auto", ess_threshold=0)
    assert ess(out.reward_scale[:, None] * out.scored[0]).item() == pytest.approx(2, rel=1e-6)
