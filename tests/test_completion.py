"""What a notebook completes: the pipeline's own arguments, options, rewards."""

import inspect
import re
from types import SimpleNamespace

import IPython.display
import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell

import glassflows
import tiny
from glassflows import FeynmanKacSteerer, GLASSScheduler, Steerer, rewards


def names(function):
    return [*inspect.signature(function).parameters]


def test_calls_show_the_arguments_of_the_pipeline(toy):
    for steer in (toy.steerer(), Steerer(toy.pipe, tiny.brightness)):
        shown = names(steer)
        assert shown[:3] == ["prompt", "select", "record"]
        assert {*names(toy.pipe.__call__)} - {"kwargs"} <= {*shown}
        assert "kwargs" not in shown
        defaults = inspect.signature(steer).parameters
        assert defaults["num_images_per_prompt"].default is None  # all of them, not one


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
    assert not {"self", "native"} & {*names(make)}
    assert ("options" in names(make)) == (make.__name__ == "from_config")  # native keys, such as shift


def test_rewards_show_rewards_alone():
    shown = dir(rewards)
    assert shown == sorted(rewards.__all__)
    assert all(callable(getattr(rewards, name)) for name in shown)
    assert dir(glassflows) == sorted(glassflows.__all__)


def test_ipython_completes_them(flux):
    shell = InteractiveShell()
    shell.user_ns |= {"steer": flux.steerer(), "GLASSScheduler": GLASSScheduler, "rewards": rewards}
    shell.Completer.use_jedi = False

    def completed(text):
        with provisionalcompleter():
            return [one.text for one in shell.Completer.completions(text, len(text))]

    assert "max_sequence_length=" in completed("steer(max_seq")
    assert "num_transitions=" in completed("GLASSScheduler.from_config(num_tr")
    assert [name.rsplit(".")[-1] for name in completed("rewards.Pick")] == ["PickScore"]


# ---- pictures while a run is on --------------------------------------------------------------------------------------


@pytest.fixture
def notebook(monkeypatch):
    """Note what a notebook is shown: a page, and those that take its place."""
    pages = []

    class Handle:
        def update(self, content):
            pages.append(content.data)

    def shown(content, display_id):
        assert display_id is True
        pages.append(content.data)
        return Handle()

    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setattr(IPython.display, "display", shown)
    return pages


@pytest.mark.parametrize("options", [{}, {"look_ahead": 1}, {"twist": 0.5}, {"widths": (8, 4, 2)}])
def test_every_scoring_is_shown(flux, notebook, options):
    options = {"reward_scale": 1.0} | options
    if "widths" in options:
        options["num_particles"] = 8
    out = flux.steer(["a cat", "a <dog>"], display=True, **options)
    assert len(notebook) == len(out.transitions) == 2
    assert [f"transition {at + 1} of 3" in page for at, page in zip(out.transitions, notebook, strict=True)] == [
        True
    ] * 2
    assert [page.count("<img") for page in notebook] == [8, 8]  # the best four of each
    assert all("a &lt;dog&gt;" in page for page in notebook)
    assert out.previews is None
    first = [float(score) for score in re.findall("<figcaption>(.*?)<", notebook[0])]
    for prompt in range(2):
        some = first[4 * prompt : 4 * prompt + 4]
        assert some == pytest.approx(sorted(out.scored[0, prompt].tolist(), reverse=True)[:4], rel=1e-2)
    assert out == flux.steer(["a cat", "a <dog>"], **options)


def test_the_best_is_that_of_the_target(flux, notebook):
    out = flux.steer(display=True, reward_scale=-1.0)
    first = [float(score) for score in re.findall("<figcaption>(.*?)<", notebook[0])]
    assert first == pytest.approx(sorted(out.scored[0, 0].tolist()), rel=1e-2)


def test_outside_of_a_notebook(flux):
    with pytest.raises(ValueError, match="expected a notebook.*previews=True"):
        flux.steer(display=True)
