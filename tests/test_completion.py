"""What a notebook completes: the pipeline's own arguments, options, rewards."""

import inspect

import pytest

import glassflows
import tiny
from glassflows import FeynmanKacSteerer, GLASSScheduler, Steerer, rewards


def names(function):
    return [*inspect.signature(function).parameters]


def test_calls_show_the_arguments_of_the_pipeline(toy):
    for steer in (toy.steerer(), Steerer(toy.pipe, tiny.brightness)):
        shown = names(steer)
        assert shown[:3] == ["prompt", "select", "record"]
        assert set(names(toy.pipe.__call__)) <= {*shown}
        assert shown[-1] == "kwargs"


def test_calls_follow_the_pipeline(flux, sd):
    steer = flux.steerer()
    assert "negative_prompt_embeds" not in names(steer) or "max_sequence_length" in names(steer)
    assert "max_sequence_length" in names(steer)
    steer.pipe = sd.pipe
    assert "max_sequence_length" not in names(steer)
    assert "guidance_rescale" in names(steer)


def test_classes_show_their_constructors():
    assert {"pipe", "reward", "strategy", "num_particles"} <= {*names(Steerer)}
    shown = {*names(FeynmanKacSteerer)}
    assert {"particle_batch_size", "reward_scale", "ess_threshold", "calibration", "widths"} <= shown
    assert "prompt" not in shown


@pytest.mark.parametrize("make", [GLASSScheduler.from_config, GLASSScheduler.from_scheduler])
def test_makers_show_options(make):
    assert {"num_transitions", "correlation", "first_transition", "solver_order"} <= {*names(make)}
    assert names(make)[0] in ("config", "scheduler")
    assert "self" not in names(make)


def test_rewards_show_rewards_alone():
    shown = dir(rewards)
    assert shown == sorted(rewards.__all__)
    assert all(callable(getattr(rewards, name)) for name in shown)
    assert dir(glassflows) == sorted(glassflows.__all__)


def test_ipython_completes_them(flux):
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    from IPython.core.completer import provisionalcompleter

    shell.user_ns |= {"steer": flux.steerer(), "GLASSScheduler": GLASSScheduler, "rewards": rewards}
    shell.Completer.use_jedi = False

    def completed(text):
        with provisionalcompleter():
            return [one.text for one in shell.Completer.completions(text, len(text))]

    assert "max_sequence_length=" in completed("steer(max_seq")
    assert "num_transitions=" in completed("GLASSScheduler.from_config(num_tr")
    assert [name.rsplit(".")[-1] for name in completed("rewards.Pick")] == ["PickScore"]
