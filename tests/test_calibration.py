"""Calibration: slopes against closed forms, their errors against their scatter, and a target that stays what it is."""

import dataclasses
import inspect
import io
import json
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import tiny
from glassflows import (
    BeamSearch,
    BestOfN,
    Calibration,
    FeynmanKac,
    FeynmanKacSteerer,
    GLASSScheduler,
    Steerer,
    SteeringResult,
)
from glassflows.flow.noise import RectifiedFlow
from glassflows.scheduler import Boundary
from glassflows.smc.weights import ess, normalise
from glassflows.steering.calibration import Unmoved, calibrate_from
from oracles import gaussian
from test_exact import Exact

PROMPTS = ["a cat", "a dog", "a red fox", "a blue bird"]


def made(*slopes, error=0.0, num_calls=6):
    """A calibration of these slopes, at which nothing is shrunk unless there is an error."""
    errors = (error,) * len(slopes)
    return Calibration(slopes, errors, tuple(0.5 for _ in slopes), errors, 0.7, num_calls, 8, 8)


def normal(*shape, seed):
    return torch.randn(*shape, generator=tiny.seeded(seed), dtype=torch.float64)


# ---- the regression --------------------------------------------------------------------------------------------------


def drawn(prompts=6, particles=7, seed=0):
    """Three scorings and final rewards that depend on them, of prompts that differ in their means."""
    scored = normal(3, prompts, particles, seed=seed)
    rewards = 0.8 * scored[2] + 0.2 * scored[1] + normal(prompts, particles, seed=seed + 1)
    shift = 5 * normal(prompts, 1, seed=seed + 2)
    return scored + shift, rewards - 2 * shift


def test_one_prompt_is_a_line_through_points():
    scored, rewards = drawn(prompts=1)
    found = calibrate_from(scored, rewards, 6)
    for k, x in enumerate(scored[:, 0].numpy()):
        assert found.slopes[k] == pytest.approx(np.polyfit(x, rewards[0], 1)[0], abs=1e-12)
        assert found.correlations[k] == pytest.approx(np.corrcoef(x, rewards[0])[0, 1], abs=1e-12)
    assert (found.num_transitions, found.transitions) == (4, (1, 2, 3))
    assert (found.num_calls, found.num_prompts, found.num_particles) == (6, 1, 7)


def test_several_prompts_are_parallel_lines():
    """Least squares with an intercept for each prompt; with one for all of them the slopes are others."""
    scored, rewards = drawn()
    found = calibrate_from(scored, rewards)
    own = np.kron(np.eye(6), np.ones((7, 1)))
    y = rewards.flatten().numpy()
    without = y - own @ np.linalg.lstsq(own, y, rcond=None)[0]
    for k, x in enumerate(scored.flatten(1).numpy()):
        fit = np.linalg.lstsq(np.column_stack([x, own]), y, rcond=None)[0]
        assert found.slopes[k] == pytest.approx(fit[0], abs=1e-12)
        assert found.slopes[k] != pytest.approx(np.polyfit(x, y, 1)[0], abs=0.5)
        partial = np.corrcoef(x - own @ np.linalg.lstsq(own, x, rcond=None)[0], without)[0, 1]
        assert found.correlations[k] == pytest.approx(partial, abs=1e-12)


def test_the_proposed_scale_leaves_half_of_the_final_particles():
    """In the median prompt: its spread is 3, of others 1 and 10; one without differences does not count."""
    rewards = torch.tensor([1.0, 3.0, 10.0, 0.0])[:, None] * normal(1, 8, seed=0)
    found = calibrate_from(rewards[None], rewards)
    assert ess(found.reward_scale * rewards)[1].item() == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize("constant", [0.1, 1e8 + 0.1, -3.3])
def test_a_boundary_at_which_nothing_differs(constant):
    """0 and not NaN, whatever is rounded; and prompts of a constant reward count for nothing."""
    scored, rewards = drawn()
    scored[1] = constant
    found = calibrate_from(scored, rewards)
    for column in (found.slopes, found.slope_errors, found.correlations, found.correlation_errors, found.shrunk):
        assert column[1] == 0
    assert found.slopes[2] > 0
    more = calibrate_from(*(torch.cat([one, torch.full_like(one, constant)], -2) for one in (scored, rewards)))
    assert more.slopes == pytest.approx(found.slopes, abs=1e-12)
    assert more.correlations == pytest.approx(found.correlations, abs=1e-12)


@pytest.mark.parametrize(("x", "y"), [(1e-200, 1e-200), (1e200, 1e200), (1e-3, 1e5)])
def test_units(x, y):
    """Slopes are rewards per reward, correlations have no unit, however large rewards are."""
    scored, rewards = drawn()
    one, other = calibrate_from(scored, rewards), calibrate_from(x * scored, y * rewards)
    assert np.array(other.slopes) * x / y == pytest.approx(one.slopes, rel=1e-6)
    assert np.array(other.slope_errors) * x / y == pytest.approx(one.slope_errors, rel=1e-6)
    assert other.correlations == pytest.approx(one.correlations, rel=1e-6)
    assert other.reward_scale * y == pytest.approx(one.reward_scale, rel=1e-6)


def test_a_default_device_changes_nothing():
    scored, rewards = drawn()
    with torch.device("meta"):
        found = calibrate_from(scored, rewards)
    assert found == calibrate_from(scored, rewards)


# ---- standard errors -------------------------------------------------------------------------------------------------


def draws(prompts, particles, seed):
    """Two scorings of prompts whose slopes differ, about .4 and .9, and whose rewards spread differently."""
    own = 1.2 * torch.rand(prompts, 1, generator=tiny.seeded(seed), dtype=torch.float64) - 0.6
    spread = 1 + torch.rand(prompts, 1, generator=tiny.seeded(seed + 1), dtype=torch.float64)
    if prompts == 1:
        own, spread = torch.zeros_like(own), torch.ones_like(spread)
    x = spread * normal(2, prompts, particles, seed=seed + 2)
    mixed = (0.4 + own) * x[0] + normal(prompts, particles, seed=seed + 3)
    return torch.stack([x[0], (mixed + 0.3 * x[1]) / 0.9]), mixed


@pytest.mark.slow
@pytest.mark.parametrize(("prompts", "particles"), [(12, 8), (40, 2), (1, 60)])
def test_errors_are_the_scatter_of_calibrations(prompts, particles):
    """Of 300 independent ones, within 25 %.

    Their variances are not, nor, of slopes that differ from prompt to prompt, errors by bootstrap over the particles
    of all of them.
    """
    samples = [draws(prompts, particles, 10 * seed) for seed in range(300)]
    found = [calibrate_from(*one) for one in samples]
    for value, error in (("slopes", "slope_errors"), ("correlations", "correlation_errors")):
        scatter = np.std([getattr(one, value) for one in found], axis=0, ddof=1)
        told = np.mean([getattr(one, error) for one in found], axis=0)
        assert told == pytest.approx(scatter, rel=0.25), value
        assert told**2 != pytest.approx(scatter, rel=0.25), value
    if (prompts, particles) == (12, 8):
        pooled = [
            [(one - one.mean(-1, keepdim=True)).reshape(*one.shape[:-2], 1, -1) for one in both] for both in samples
        ]
        alone = np.mean([calibrate_from(*one).slope_errors for one in pooled], axis=0)
        assert alone != pytest.approx(np.std([one.slopes for one in found], axis=0, ddof=1), rel=0.25)


def test_errors_are_the_same_each_time():
    assert calibrate_from(*drawn()) == calibrate_from(*drawn())
    assert calibrate_from(*drawn()) != calibrate_from(*drawn(seed=1))


@pytest.mark.parametrize("seed", range(5))
def test_a_resample_of_one_particle_has_no_slope(seed):
    """Of three particles on a line of slope 1 one in nine resamples is of the same one, whatever is rounded: 0."""
    x = normal(1, 1, 3, seed=seed)
    wanted = math.sqrt(8 / 81) * math.sqrt(3 / 2)
    assert calibrate_from(x, x[0]).slope_errors[0] == pytest.approx(wanted, rel=0.15)


def test_slopes_are_shrunk_by_their_errors():
    found = made(1.0, 0.5, 0.25, 0.2, -0.5, 0.0, error=0.25)
    assert found.shrunk == pytest.approx((1 - 0.0625, 0.5 * 0.75, 0, 0, 0, 0))
    assert found.schedule(2.0) == pytest.approx((1.875, 0.75, 0, 0, 0, 0, 2.0))
    assert made(1.0, 0.5, 0.0, -0.5).shrunk == (1.0, 0.5, 0.0, 0.0)


# ---- against closed forms, through the pipeline ----------------------------------------------------------------------


def exact(particles, reward, steps=100, **options):
    """A steerer of N(0, 1) by its exact denoiser, in five transitions, and the arguments of its calls."""
    pipe = Exact(FlowMatchEulerDiscreteScheduler())
    pipe.denoiser = gaussian
    pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler, num_transitions=5)
    pipe.scheduler.set_generator(tiny.seeded(1000))
    steerer = FeynmanKacSteerer(pipe, reward, particles, decode=lambda z: z, **options)
    return steerer, {"num_inference_steps": steps, "generator": tiny.seeded(0), "output_type": "np"}


def agrees(found, slopes, correlations):
    """Whether slopes and correlations are within 4 standard errors of what they should be."""
    pairs = (
        (found.slopes, slopes, found.slope_errors),
        (found.correlations, correlations, found.correlation_errors),
    )
    return all((np.abs(np.subtract(got, wanted)) < 4 * np.array(errors)).all() for got, wanted, errors in pairs)


@pytest.mark.slow
def test_linear_gaussian():
    """z ~ N(0, 1) and r(z) = z: z given x_t has mean ẑ, whose variance is v = P / (1 + P), P the SNR of x_t.

    So the slope is 1 and the correlation √v. With noise of variance s² in every score slopes are v / (v + s²) and
    correlations v / √((v + s²)(1 + s²)). Prompts have means of their own, which have to be taken out.
    """
    prompts = [str(shift) for shift in (3 * normal(200, seed=5)).tolist()]
    noise = tiny.seeded(7)

    def reward(z, names, spread=1.0):
        fresh = spread * torch.randn(len(z), generator=noise, dtype=torch.float64)
        return z.flatten().double() + torch.tensor([float(name) for name in names]).double() + fresh

    def clear(z, names):
        return reward(z, names, 0.0)

    for score, variance in ((clear, 0.0), (reward, 1.0)):
        steerer, call = exact(50, score)
        steerer.strategy = watched = Unmoved()
        out = steerer(prompts, **call)
        v = np.array([at.level.snr / (1 + at.level.snr) for at in watched.boundaries])
        wanted = v / (v + variance), v / np.sqrt((v + variance) * (1 + variance))
        assert agrees(calibrate_from(out.scored, out.rewards), *wanted)
        assert not agrees(calibrate_from(out.scored, out.rewards), *wanted[::-1])
        pooled = calibrate_from(out.scored.reshape(4, 1, -1), out.rewards.reshape(1, -1))
        assert not agrees(pooled, *wanted)


def weighted_mean(out):
    return float((normalise(out.log_weights).exp() * out.rewards).sum())


def first(z, prompts):
    return z.flatten()


@pytest.mark.slow
def test_the_target_stays_what_it_is():
    """N(0, 1) tilted by e^(2x) has mean and log-evidence 2, in this sampler 2 Var: for good slopes and for absurd ones.

    A last scale that is calibrated, too, is another target.
    """
    plain, call = exact(2000, first, steps=50, reward_scale=0.0)
    own = 2 * float(plain([""] * 50, **call).rewards.var())
    assert own == pytest.approx(2, abs=0.05)

    def errors(**options):
        """Return how far the means of 16 runs are from it, in standard errors."""
        steerer, call = exact(2000, first, steps=50, **options)
        runs = [steerer("", **call) for _ in range(16)]
        for values in ([weighted_mean(out) for out in runs], [float(out.log_evidence) for out in runs]):
            yield abs(np.mean(values) - own) / (np.std(values, ddof=1) / 4 + 0.005)

    for slopes in ((0.1, 0.4, 0.7, 0.9), (0.0, 1.4, 0.2, 0.5)):
        assert max(errors(reward_scale=2.0, calibration=made(*slopes, num_calls=50))) < 3
    assert max(errors(reward_scale=[0.2, 0.8, 1.4, 1.8, 1.9])) > 3


# ---- calls -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux():
    return tiny.Toy(tiny.flux)


@pytest.fixture(scope="module")
def found(flux):
    return flux.steerer().calibrate(**flux.arguments(PROMPTS))


def test_a_calibration_is_of_particles_that_are_never_moved(flux, found):
    """That of the rewards of a run without resampling, whatever the steerer's own options; its numbers are those."""
    out = flux.steer(PROMPTS, ess_threshold=0)
    assert found == calibrate_from(out.scored, out.rewards, 6)
    assert (found.num_transitions, found.num_calls, found.num_prompts, found.num_particles) == (3, 6, 4, 4)
    options = {
        "ess_threshold": 1.0, "start": 0.5, "score_every": 2, "reward_scale": -3.0, "previews": True, "twist": 1.0,
    }  # fmt: skip
    steerer = flux.steerer(**options)
    for more in ({}, {"select": "best"}, {"return_dict": False}, {"num_images_per_prompt": 2}):
        assert steerer.calibrate(**flux.arguments(PROMPTS), **more) == found
    best = Steerer(flux.pipe, tiny.brightness, BestOfN(), 4, num_transitions=3)
    assert best.calibrate(**flux.arguments(PROMPTS), apply=False) == found


def test_it_is_applied(flux, found):
    steerer = flux.steerer()
    before = repr(steerer)
    assert steerer.calibration is None
    assert steerer.calibrate(**flux.arguments(PROMPTS), apply=False) == found
    assert steerer.calibration is None
    assert repr(steerer) == before
    assert steerer.calibrate(**flux.arguments(PROMPTS)) is steerer.calibration
    assert steerer.strategy == FeynmanKac(reward_scale=1.0, start=0.0, calibration=found)
    general = Steerer(flux.pipe, tiny.brightness, FeynmanKac(), 4, num_transitions=3)
    assert general.calibrate(**flux.arguments(PROMPTS)) == general.strategy.calibration
    steerer.calibration = None
    assert repr(steerer) == before


def test_the_scale_stays_that_of_the_reward(flux):
    """A reward that is changed later brings its own."""

    class Bright:
        reward_scale = 3.0

        def __call__(self, images, prompts):
            return tiny.brightness(images, prompts)

    steerer = flux.steerer(reward=Bright())
    steerer.calibrate(**flux.arguments(PROMPTS))
    assert steerer.reward_scale == 3
    steerer.reward = tiny.brightness
    assert steerer.reward_scale == 1


@pytest.mark.parametrize("scale", [2.0, -2.0, 0.0])
def test_a_calibrated_steerer_follows_its_schedule(flux, scale):
    """Bit for bit what the list of its scales does; and not what the scale alone does."""
    calibration = made(0.2, 0.7)
    out = flux.steer(PROMPTS, calibration=calibration, reward_scale=scale, ess_threshold=1.0)
    listed = flux.steer(PROMPTS, reward_scale=[0.2 * scale, 0.7 * scale, scale], ess_threshold=1.0)
    for name in ("images", "ancestors", "ess", "rewards", "log_weights", "log_evidence", "reward_scale"):
        assert np.array_equal(getattr(out, name), getattr(listed, name)), name
    alone = flux.steer(PROMPTS, reward_scale=scale, ess_threshold=1.0)
    assert np.array_equal(out.ess, alone.ess) == (scale == 0)
    assert out.reward_scale.tolist() == [scale] * 4


def test_windows_of_a_calibrated_steerer(flux):
    """Slopes go by the boundary, not by the scoring."""
    options = {"ess_threshold": 0, "start": 0.5}
    out = flux.steer(PROMPTS, calibration=made(0.2, 0.7), reward_scale=2.0, **options)
    torch.testing.assert_close(out.ess[0], ess(1.4 * out.scored[0]))


def test_slopes_of_nothing_resample_nothing(flux):
    out = flux.steer(PROMPTS, calibration=made(0.3, -0.2, error=0.3), reward_scale=2.0, ess_threshold=1.0)
    assert not out.resampled.any()
    torch.testing.assert_close(out.log_weights, normalise(2 * out.rewards))


def test_a_run_that_fails_leaves_the_steerer_as_it_was(flux):
    def fail(images, prompts):
        raise KeyboardInterrupt

    steerer, scheduler = flux.steerer(reward=fail, previews=True), flux.pipe.scheduler
    before = dict(vars(steerer))
    with pytest.raises(KeyboardInterrupt):
        steerer.calibrate(**flux.arguments(PROMPTS))
    assert vars(steerer) == before
    assert flux.pipe.scheduler is scheduler


def test_a_warning_that_is_an_error_applies_nothing(flux):
    steerer = flux.steerer()
    with pytest.raises(UserWarning, match="^calibrate: expected at least 4 prompts"):  # an error in these tests
        steerer.calibrate(**flux.arguments("a cat"))
    assert steerer.calibration is None


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(function, *messages):
    with pytest.raises(ValueError, match="^" + re.escape(messages[0])) as caught:
        function()
    for message in messages[1:]:
        assert message in str(caught.value)


def test_runs_of_other_transitions_or_calls(flux):
    def run(calibration, **options):
        return flux.steer(calibration=calibration, **options)

    refused(
        lambda: run(made(0.2, 0.5, 0.7)),
        "calibration: expected a run of 4 transitions and 6 network calls, as it was made of, got one of 3 transitions "
        "and 6 network calls: calibrate again with the arguments of this call, or leave calibration out",
    )
    refused(
        lambda: run(made(0.2, 0.5), num_inference_steps=7),
        "calibration: ",
        "got one of 3 transitions and 7 network calls",
    )
    refused(lambda: run(made(0.2, 0.5), start=1.0, num_inference_steps=7), "calibration: ")  # though none is scored
    refused(
        lambda: run(made(0.2, 0.5), num_transitions=1), "calibration: expected a run of 3", "got one of 1 transition"
    )
    run(made(0.2, 0.5, num_calls=0), num_inference_steps=7)
    refused(lambda: run(made(0.2, num_calls=0)), "calibration: expected a run of 2 transitions, as it was made of, got")


def test_a_run_that_does_not_tell_its_calls():
    strategy, level = FeynmanKac(calibration=made(0.2, 0.5)), RectifiedFlow().level(0.5)
    state, rewards = strategy.init(1, 4), torch.arange(4.0).double()[None]
    strategy.step(state, rewards, Boundary(1, 3, level), [tiny.seeded()])
    strategy.step(state, rewards, Boundary(1, 3, level, num_calls=6), [tiny.seeded()])
    for at in (Boundary(1, 3, level, num_calls=5), Boundary(1, 4, level)):
        refused(lambda at=at: strategy.step(state, rewards, at, [tiny.seeded()]), "calibration: expected a run of 3")


@pytest.mark.parametrize("scale", ["auto", [0.1, 0.5, 1.0], lambda done: done])
def test_scales_that_are_no_number(flux, scale):
    said = "reward_scale: expected a number together with a calibration, since the calibration is the schedule"
    refused(lambda: FeynmanKac(scale, calibration=made(0.2, 0.5)), said, "reward_scale=0.7 for half of the final")
    refused(lambda: flux.steerer(reward_scale=scale, calibration=made(0.2, 0.5)), said)
    steerer = flux.steerer(reward_scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        seen = tiny.predictions(patch)
        refused(lambda: steerer.calibrate(**flux.arguments(PROMPTS)), said, "calibrate(..., apply=False).reward_scale")
        assert seen == []  # before anything runs
    assert steerer.calibrate(**flux.arguments(PROMPTS), apply=False).reward_scale > 0
    calibrated = flux.steerer(calibration=made(0.2, 0.5))
    refused(lambda: setattr(calibrated, "reward_scale", scale), said)
    assert calibrated.reward_scale == 1


@pytest.mark.parametrize("given", ["c.json", 0.5, (0.2, 0.5), Calibration])
def test_what_is_no_calibration(given):
    refused(lambda: FeynmanKac(calibration=given), "calibration: expected a Calibration or None, got", "load(path)")


@pytest.mark.parametrize("strategy", [BestOfN(), BeamSearch()])
def test_strategies_without_a_calibration(flux, strategy):
    steerer = Steerer(flux.pipe, tiny.brightness, strategy, 4, num_transitions=3)
    before = dict(vars(steerer))
    said = "strategy: expected one that scales rewards by a calibration, as FeynmanKac() does, got"
    refused(lambda: steerer.calibrate(**flux.arguments()), said, "pass apply=False for the calibration alone")
    assert vars(steerer) == before


def test_nothing_to_fit(flux):
    two = "calibrate: expected a run of at least 2 transitions, since those after the first are scored at their starts"
    refused(lambda: flux.steerer(num_transitions=1).calibrate(**flux.arguments()), two, "got 1: set num_transitions")
    refused(lambda: flux.steerer().calibrate(**flux.arguments(num_inference_steps=1)), two, "got 1: set num_trans")
    refused(
        lambda: flux.steerer(num_particles=1).calibrate(**flux.arguments(PROMPTS)),
        "calibrate: expected at least 2 particles of each prompt to compare, got 1: set num_particles",
    )
    refused(
        lambda: flux.steerer(reward=lambda images, prompts: [2.0] * len(images)).calibrate(**flux.arguments(PROMPTS)),
        "calibrate: expected final rewards that differ among the particles of a prompt, got [[2.0, 2.0, 2.0, 2.0],",
        "take other prompts, or a reward that tells their images apart",
    )
    for spread in (1e308, 5e-324):
        rewards = spread * torch.tensor([[-1.0, 0.0, 1.0, 1.0]] * 4).double()
        said = "calibrate: expected rewards with differences between 1e-290 and 1e308, got [["
        refused(lambda rewards=rewards: calibrate_from(rewards[None], rewards), said)


def test_a_run_that_is_interrupted(flux):
    def stop(pipe, i, t, tensors):
        pipe._interrupt = True
        return tensors

    steerer = flux.steerer()
    refused(
        lambda: steerer.calibrate(**flux.arguments(PROMPTS), callback_on_step_end=stop),
        "calibrate: expected one run of transitions to its end",
        "got an interrupted one, scored after []: calibrate with a call that runs through once",
    )
    assert steerer.calibration is None


def test_options_given_to_the_call(flux):
    with pytest.raises(TypeError, match="^reward_scale belongs to the constructor: .*FeynmanKacSteerer"):
        flux.steerer().calibrate(**flux.arguments(), reward_scale=2.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"slopes": ()}, "slopes: expected a finite number for each boundary after the first"),
        ({"correlations": (0.1,)}, "correlations: expected a finite number for each boundary after the first, 2 as"),
        ({"slope_errors": (0.1, math.nan)}, "slope_errors: expected a finite number"),
        ({"slopes": (0.1, "0.2")}, "slopes: expected a finite number"),
        ({"reward_scale": 0.0}, "reward_scale: expected a finite number above 0, got 0.0"),
    ],
)
def test_numbers_that_are_none(changed, message):
    refused(lambda: dataclasses.replace(made(0.2, 0.5), **changed), message, "use what calibrate() returns")
    refused(lambda: made(0.2).schedule("auto"), "reward_scale: expected a finite number, got 'auto': 0.7 leaves half")


# ---- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompts", "particles"), [(1, 4), (3, 8), (4, 2), (1, 2)])
def test_few_prompts_or_particles_are_said_to_be_few(flux, prompts, particles):
    """At the line of the call, with the largest standard error."""
    steerer = flux.steerer(num_particles=particles)
    with pytest.warns(UserWarning, match="^calibrate: expected at least 4 prompts") as caught:
        both = steerer.calibrate(**flux.arguments(PROMPTS[:prompts])), inspect.currentframe().f_lineno
    calibration, line = both
    (warning,) = caught
    assert (warning.filename, warning.lineno) == (__file__, line)
    k = int(np.argmax(calibration.slope_errors))
    assert str(warning.message) == (
        f"calibrate: expected at least 4 prompts and 4 particles of each, got {prompts} and {particles}: slopes are as "
        f"uncertain as {calibration.slopes[k]:.2g} ± {calibration.slope_errors[k]:.2g} (standard error) after {k + 1} "
        "of 3 transitions, and this error itself is uncertain: give more"
    )
    assert max(calibration.slope_errors) > 0
    assert steerer.calibration == calibration


def test_a_collapse_is_told_by_the_scale_that_was_given():
    """Which is the target's; and the one that is suggested leaves half of the particles at that boundary."""
    strategy = FeynmanKac(reward_scale=100.0, calibration=made(0.5, 0.9))
    at, rewards = Boundary(1, 3, RectifiedFlow().level(0.5)), torch.arange(4.0).double()[None]
    with pytest.warns(UserWarning, match="^reward_scale=100 leaves one of 4 particles nearly all") as caught:
        strategy.step(strategy.init(1, 4), rewards, at, [tiny.seeded()])
    better = float(re.search(r"About ([\d.]+) would leave half", str(caught[0].message))[1])
    assert ess(0.5 * better * rewards).item() == pytest.approx(2, rel=0.02)


def test_it_is_printed():
    found = Calibration((0.14, 0.93), (0.08, 0.02), (-0.16, 1.0), (0.1, 0.005), 0.312, 20, 16, 8)
    assert str(found) == (
        "3 transitions and 20 network calls; 16 prompt(s) × 8 particles\n"
        "transitions done         slope   as it counts    correlation\n"
        "               1   0.14 ± 0.08           0.09   -0.16 ± 0.10\n"
        "               2   0.93 ± 0.02           0.93    1.00 ± 0.01\n"
        "reward_scale=0.312 would leave half of the final particles effective"
    )
    assert repr(found) == "Calibration(3 transitions and 20 network calls, 16 × 8 particles)"
    assert repr(FeynmanKac(calibration=found)) == f"FeynmanKac(calibration={found!r})"
    assert repr(made(0.5, num_calls=0)) == "Calibration(2 transitions, 8 × 8 particles)"


# ---- files -----------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(found, tmp_path, monkeypatch):
    path = found.save(tmp_path / "new" / "c.json")
    loaded = Calibration.load(path)
    assert loaded == found
    assert hash(loaded) == hash(found)
    assert str(loaded) == str(found)
    record = json.loads(path.read_text())
    assert record["calibration"] == 1
    assert [row["transition"] for row in record["boundaries"]] == [1, 2]
    assert record["boundaries"][0]["slope"] == found.slopes[0]
    monkeypatch.setenv("HOME", str(tmp_path))
    made(0.5).save("~/new/c.json")
    assert Calibration.load(str(path)) == made(0.5)


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("{", "something else (Expecting"),
        ("[]", "something else ("),
        ('{"rewards": 1}', "something else ('calibration')"),
        ('{"calibration": 2}', "something else (version 2)"),
        ('{"calibration": 1}', "something else ('boundaries')"),
        ('{"calibration": 1, "boundaries": [{"slope": 1}]}', "something else ('slope_error')"),
    ],
)
def test_files_of_something_else(text, got, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(text)
    refused(
        lambda: Calibration.load(path),
        f"load: expected a calibration of version 1 in {path}, got {got}",
        "name a file that Calibration.save wrote, or calibrate again",
    )
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "none.json")


def test_a_recipe_has_the_calibration(flux, found, tmp_path):
    out = flux.steer(PROMPTS, calibration=found)
    assert out.recipe["steerer"]["calibration"] == found.record()
    assert flux.steer(PROMPTS).recipe["steerer"]["calibration"] is None
    folder = out.save(tmp_path)
    assert SteeringResult.load(folder) == out
    saved = json.loads((folder / "steering.json").read_text())["recipe"]["steerer"]["calibration"]
    (tmp_path / "c.json").write_text(json.dumps(saved))
    assert Calibration.load(tmp_path / "c.json") == found


# ---- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 4, 19])
def test_a_figure_shows_values_and_errors(number):
    values = np.linspace(-0.1, 1.0, number + 1)[1:]
    found = Calibration(
        tuple(values), tuple(values / 5 + 0.1), tuple(0.9 * values), tuple(values / 9 + 0.05), 0.3, 20, 8, 8
    )
    figure = found.plot()
    for axes, centres, errors in zip(
        figure.axes,
        (found.slopes, found.correlations),
        (found.slope_errors, found.correlation_errors),
        strict=True,
    ):
        line, _, (bars,) = axes.containers[0]
        np.testing.assert_allclose(line.get_xydata(), np.column_stack([found.transitions, centres]))
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends, np.column_stack([np.subtract(centres, errors), np.add(centres, errors)]))
        assert set(axes.get_xticks()) <= set(found.transitions)
        assert number in axes.get_xticks()
        assert f"of {number + 1}" in axes.get_xlabel()
    counted = next(line for line in figure.axes[0].lines if line.get_label() == "as it counts")
    np.testing.assert_allclose(counted.get_ydata(), found.shrunk)
    figure.savefig(io.BytesIO())
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert plt.get_fignums() == []


def test_without_matplotlib(no_matplotlib):
    with pytest.raises(ImportError, match=re.escape("plot: expected matplotlib, which is not installed: pip install")):
        made(0.5).plot()
