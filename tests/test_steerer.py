"""Steerer: calls of it, which samples come back, whose generators they are drawn from, and bad input."""

import re

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

import tiny
from glassflows.host.run import PipelineRun
from glassflows.steering.population import drawn_slots


@pytest.mark.slow
def test_reward_rises(toy):
    gains = []
    for seed in range(6):
        plain = toy.steer(seed=seed, num_particles=8, reward_scale=0).rewards.mean()
        steered = toy.steer(seed=seed, num_particles=8, reward_scale=3, ess_threshold=1).rewards.mean()
        gains.append((steered - plain).item())
    assert np.mean(gains) > 2 * np.std(gains) / np.sqrt(6)


def test_zero_reward_scale_is_no_steering(toy):
    """Bit for bit the images of the pipeline with a GLASSScheduler."""
    out = toy.steer(reward_scale=0)
    plain = toy.glass().run(num_images_per_prompt=4)
    assert np.array_equal(out.images, plain[out.order[0]])


def test_one_particle_is_a_plain_image(flux):
    """Also where its generator is given as a list of one."""
    one, listed = (flux.steer(num_particles=1, generator=given) for given in (tiny.seeded(), [tiny.seeded()]))
    plain = flux.glass().run()
    assert np.array_equal(one.images, plain)
    assert np.array_equal(listed.images, plain)
    assert not one.resampled.any()


@pytest.mark.filterwarnings("ignore:You have passed 3 text prompts:FutureWarning")  # SD's, of plain calls too
def test_image_to_image(img2img):
    assert img2img.steer(num_particles=3, num_inference_steps=9).ancestors.shape == (2, 1, 3)


def test_a_glass_scheduler_in_the_pipeline_keeps_its_options(flux):
    flux.glass(2)
    assert len(flux.steer(num_transitions=None).ancestors) == 1
    assert len(flux.steer(num_transitions=4).ancestors) == 3


@pytest.mark.parametrize("glass", [False, True])
def test_the_pipeline_is_restored(flux, glass):
    """After a call, an error and a keyboard interrupt, which pass through as they are."""
    pipe = flux.pipe
    if glass:
        flux.glass(2)

    def plain():
        if glass:
            pipe.scheduler.set_generator(tiny.seeded(5))
        return flux.run()

    images, before, config, attributes = plain(), pipe.scheduler, dict(pipe.config), set(vars(pipe))

    def unchanged():
        assert pipe.scheduler is before
        assert dict(pipe.config) == config
        assert set(vars(pipe)) == attributes
        assert np.array_equal(plain(), images)

    flux.steer()
    unchanged()
    for error in (RuntimeError("mine"), KeyboardInterrupt()):

        def fail(*args, error=error):
            raise error

        for options in ({"reward": fail}, {"decode": fail}):
            with pytest.raises(type(error)) as caught:
                flux.steer(**options)
            assert caught.value is error
            unchanged()


def test_callbacks_and_interrupts_are_the_users(flux):
    seen = []

    def noting(pipe, i, t, kwargs):
        seen.append((i, kwargs["latents"].shape))
        pipe._interrupt = i == last
        return kwargs

    for last in (None, 3):
        seen.clear()
        out = flux.steer(reward_scale=1, callback_on_step_end=noting)
        steps = 6 if last is None else 4
        assert seen == [(i, (4, 24, 16)) for i in range(steps)]
        assert out.ledger.network_calls == 4 * steps
        assert out.transitions == ((1, 2) if last is None else (1,))
        assert out.interrupted == (last is not None)
        assert np.isfinite(out.images).all()


def test_interrupted_before_the_first_step(flux):
    pipe, encode = flux.pipe, flux.pipe.encode_prompt

    def stopping(*args, **kwargs):
        pipe._interrupt = True
        return encode(*args, **kwargs)

    pipe.encode_prompt = stopping
    out = flux.steer(reward_scale=1)
    assert out.interrupted
    assert len(out.images) == 4
    assert out.transitions == ()


def test_progress(flux, capsys):
    flux.pipe.set_progress_bar_config(disable=False)
    flux.steer(reward_scale=1)
    bar = capsys.readouterr().err
    assert "reward=" in bar
    assert "ess=" in bar
    flux.pipe.set_progress_bar_config(disable=True)
    flux.steer(reward_scale=1)
    assert capsys.readouterr().err == ""


def test_the_bar_shows_the_best_reward(flux, monkeypatch):
    shown = []
    monkeypatch.setattr(PipelineRun, "show", lambda self, **values: shown.append(values))
    out = flux.steer(reward_scale=1)
    assert [float(one["reward"]) for one in shown] == pytest.approx(out.scored.amax((1, 2)).tolist(), rel=1e-3)
    assert [float(one["ess"]) for one in shown] == pytest.approx(out.ess.mean(1).tolist(), abs=0.06)


# ---- which samples come back -----------------------------------------------------------------------------------------

PROMPTS = ["a cat", "a dog"]


def test_selection(flux):
    everything = flux.steer(PROMPTS, reward_scale=1)
    best = flux.steer(PROMPTS, reward_scale=1, select="best")
    two = flux.steer(PROMPTS, reward_scale=1, num_images_per_prompt=2)
    assert np.array_equal(best.images, everything.images[[0, 4]])
    assert np.array_equal(two.images, everything.images[[0, 1, 4, 5]])
    assert two.order.tolist() == everything.order[:, :2].tolist()
    drawn = flux.steer(PROMPTS, reward_scale=1, select="sample")
    for prompt in range(2):
        slots = everything.order[prompt].tolist()
        places = [4 * prompt + slots.index(slot) for slot in drawn.order[prompt].tolist()]
        assert np.array_equal(drawn.images[4 * prompt : 4 * prompt + 4], everything.images[places])
    images, result = flux.steer(return_dict=False)
    assert images is result.images


def test_selected_samples_follow_the_weights():
    log_weights = torch.tensor([[0.1, 0.2, 0.7]], dtype=torch.float64).log()
    generator = tiny.seeded()
    draws = torch.cat([drawn_slots(log_weights, generator, 1) for _ in range(3000)])
    np.testing.assert_allclose(torch.bincount(draws.flatten()) / 3000, [0.1, 0.2, 0.7], atol=0.03)


def test_samples_are_drawn_by_the_final_weights(flux):
    """Of a reward that leaves one particle all the weight."""
    out = flux.steer(reward=lambda images, prompts: [0.0, 0.0, 1e4, 0.0], ess_threshold=0, select="sample")
    assert out.order.tolist() == [[2, 2, 2, 2]]
    assert out.image_rewards.tolist() == [1e4] * 4


# ---- generators ------------------------------------------------------------------------------------------------------


def test_same_seed_same_result(flux):
    one, two, other = (flux.steer(seed=seed, ess_threshold=1) for seed in (0, 0, 1))
    assert np.array_equal(one.images, two.images)
    assert torch.equal(one.log_evidence, two.log_evidence)
    assert not np.array_equal(one.images, other.images)


def test_a_generator_per_prompt(flux):
    """A prompt's particles depend on its own generator, and part ways."""
    both, other = (
        flux.steer(PROMPTS, num_particles=3, generator=[tiny.seeded(first), tiny.seeded(1)]) for first in (0, 7)
    )
    assert np.array_equal(both.images[3:], other.images[3:])
    assert not np.array_equal(both.images[:3], other.images[:3])
    assert np.abs(np.diff(both.images[:3], axis=0)).max() > 1e-3


def test_a_prompt_among_others_is_a_prompt_alone(flux):
    latents = flux.latents(8)
    both = flux.steer(PROMPTS, latents=latents, generator=None, ess_threshold=1)
    one = flux.steer("a dog", latents=latents[4:], generator=None, ess_threshold=1)
    assert torch.equal(both.ancestors[:, 1:], one.ancestors)
    np.testing.assert_allclose(both.images[4:], one.images, atol=2e-5)


# ---- bad input -------------------------------------------------------------------------------------------------------


BAD = {
    "num_particles: expected at least 1, got 0": {"num_particles": 0},
    "reward: expected a function of images and prompts, got NoneType": {"reward": None},
    "num_images_per_prompt: expected 1 to num_particles=4, got 5": {"num_images_per_prompt": 5},
    "num_images_per_prompt: expected 1 to num_particles=4, got 0": {"num_images_per_prompt": 0},
    "select: expected one of ('all', 'best', 'best_seen', 'sample'), got 'worst'": {"select": "worst"},
    'output_type: expected "pil", "np", "pt" or "latent", got \'jpeg\'': {"output_type": "jpeg"},
}


def test_bad_input(flux):
    for message, kwargs in BAD.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            flux.steer(**kwargs)


def test_a_scheduler_without_a_counterpart_is_refused(flux):
    flux.pipe.scheduler = LCMScheduler()
    with pytest.raises(ValueError, match="got LCMScheduler, which has no GLASS counterpart"):
        flux.steerer()


def test_unknown_keywords_reach_the_pipeline(flux):
    with pytest.raises(TypeError, match=r"__call__\(\) got an unexpected keyword argument 'num_inference_stepz'"):
        flux.steer(num_inference_stepz=4)
    assert type(flux.pipe.scheduler) is FlowMatchEulerDiscreteScheduler
