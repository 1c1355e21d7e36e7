"""`compare`: several steerers on the same prompts, the table and the contact sheet."""

import math

import pytest
import torch

import tiny
from glassflows import BestOfN, FeynmanKac, Steerer, compare

PROMPTS = ["a cat", "a dog", "a <bird>"]


def steerers(toy, particles=4):
    return {
        "best of N": Steerer(toy.pipe, tiny.brightness, BestOfN(), particles, num_transitions=1),
        "steered": Steerer(toy.pipe, tiny.brightness, FeynmanKac(start=0.0), particles, num_transitions=3),
    }


def arguments(toy, **given):
    """Return the keyword arguments of a call but for the prompt."""
    return {name: value for name, value in toy.arguments(**given).items() if name != "prompt"}


def darkness(images, prompts):
    return -images.mean((1, 2, 3))


def test_each_is_called_as_it_would_be_alone(flux):
    generator = tiny.seeded(3)
    torch.randn(5, generator=generator)
    state = generator.get_state()
    call = arguments(flux, generator=generator)
    both = compare(steerers(flux), PROMPTS, **call)
    assert torch.equal(generator.get_state(), state)
    for name, steer in steerers(flux).items():
        generator.set_state(state)
        assert steer(PROMPTS, select="best", **call) == both[name]
    assert [*both] == ["best of N", "steered"]


def test_the_table(flux):
    call = arguments(flux)
    both = compare(steerers(flux), PROMPTS, judges={"dark": darkness}, **call)
    first, second = both.rows
    assert (first[""], second[""]) == ("best of N", "steered")
    assert first["network calls"] == second["network calls"] == 24
    assert (first["reward calls"], second["reward calls"]) == (4, 12)
    rewards = [both[name].rewards.amax(1) for name in both]
    assert second["reward"] == pytest.approx(float(rewards[1].mean()))
    gains = rewards[1] - rewards[0]
    assert (first["reward Δ"], first["reward Δ ±"]) == (0, 0)
    assert second["reward Δ"] == pytest.approx(float(gains.mean()))
    assert second["reward Δ ±"] == pytest.approx(float(gains.std()) / math.sqrt(3))
    for row, score in zip((first, second), rewards, strict=True):
        assert row["dark"] == pytest.approx(-float(score.mean()) / 1000, abs=1e-3)  # of bytes
    lines = str(both).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert "| steered | 4 | 24 | 12 |" in lines[3]


def test_equal_calls(flux):
    call = arguments(flux)
    narrowing = FeynmanKac(start=0.0, widths=(8, 4, 4))
    made = steerers(flux) | {"narrowing": Steerer(flux.pipe, tiny.brightness, narrowing, 8, num_transitions=3)}
    out = compare(made, PROMPTS, network_calls=36, **call)
    assert [row["particles"] for row in out.rows] == [6, 6, 8]
    assert all(row["network calls"] <= 36 for row in out.rows)
    assert made["steered"].num_particles == 4  # left alone


def test_one_prompt_has_no_error(flux):
    call = arguments(flux)
    out = compare(steerers(flux), "a cat", **call)
    assert math.isnan(out.rows[1]["reward Δ ±"])
    assert "±" not in str(out).splitlines()[3]


@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_pictures(flux, output_type):
    call = arguments(flux, output_type=output_type)
    both = compare(steerers(flux), PROMPTS, **call)
    page = both._repr_html_()
    assert page.count("<img") == 6
    assert "a &lt;bird&gt;" in page
    figure = both.plot()
    assert len(figure.axes) == 6
    assert [axis.get_title() for axis in figure.axes[:2]] == ["best of N", "steered"]
    assert figure.axes[5].get_images()[0].get_array().shape == (16, 24, 3)


def test_latents_have_a_table_alone(flux):
    call = arguments(flux, output_type="latent")
    both = compare(steerers(flux), PROMPTS, **call)
    assert "<img" not in both._repr_html_()
    with pytest.raises(ValueError, match="expected images or videos"):
        both.plot()


@pytest.mark.parametrize(
    ("given", "error", "complaint"),
    [
        ({"steerers": {}}, ValueError, "expected some by name.*got {}"),
        ({"steerers": ["a list"]}, ValueError, r"expected some by name.*got \['a list'\]"),
        ({"judges": {"reward": darkness}}, ValueError, "judges: expected other names than reward"),
        (
            {"judges": {"few": lambda images, prompts: [1.0, 2.0]}},
            ValueError,
            r"few returned shape \(2,\).*shape \(3,\)",
        ),
        ({"select": "all"}, TypeError, "select: expected no such argument"),
        ({"network_calls": 36}, ValueError, "num_inference_steps: expected a number"),
        ({"network_calls": 6, "num_inference_steps": 6}, ValueError, "pays for 6 network calls"),
    ],
)
def test_refusals(flux, given, error, complaint):
    given = {"steerers": steerers(flux)} | given
    with pytest.raises(error, match=complaint):
        compare(given.pop("steerers"), PROMPTS, **tiny.FLUX_CALL, **given)
