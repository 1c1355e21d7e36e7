"""FeynmanKacSteerer around real pipelines at toy size."""

import base64
import dataclasses
import json
import math
import re
import time
from itertools import pairwise

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LCMScheduler
from PIL.Image import Image
from PIL.Image import fromarray as from_array
from PIL.Image import open as open_image

import tiny
from glassflows import FeynmanKacSteerer, GLASSScheduler
from glassflows.host.decode import PipelineCall, decoder
from glassflows.host.outputs import rows_of_output
from glassflows.host.run import PipelineRun
from glassflows.rewards import as_reward
from glassflows.smc.weights import ess, log_mean, normalise

matplotlib.use("Agg")


def brightness(images, prompts):
    """How bright an image is; spread enough for a toy model's images to differ."""
    assert images.dtype == torch.float32
    assert images.shape[1:] == (3, 16, 24)
    assert len(images) == len(prompts)
    assert images.min() >= 0
    assert images.max() <= 1
    return 1000 * images.mean((1, 2, 3))


def call(pipe):
    return (tiny.FLUX_CALL if "Flux" in type(pipe).__name__ else tiny.SD_CALL) | {"num_inference_steps": 6}


def steer(pipe, prompt="a cat", *, seed=0, num_particles=4, output_type="np", num_transitions=3, **options):
    steerer = FeynmanKacSteerer(
        pipe, **({"reward": brightness} | options), num_particles=num_particles, num_transitions=num_transitions
    )
    return steerer(prompt, generator=tiny.seeded(seed), output_type=output_type, **call(pipe))


PIPELINES = [tiny.flux, tiny.sd]


@pytest.mark.parametrize("make", PIPELINES)
def test_reward_rises(make):
    pipe, gains = make(), []
    for seed in range(6):
        plain = steer(pipe, seed=seed, num_particles=8, reward_scale=0).rewards.mean()
        steered = steer(pipe, seed=seed, num_particles=8, reward_scale=3, ess_threshold=1).rewards.mean()
        gains.append((steered - plain).item())
    assert np.mean(gains) > 2 * np.std(gains) / math.sqrt(6)


@pytest.mark.parametrize("make", PIPELINES)
def test_zero_reward_scale_is_no_steering(make):
    """Bit for bit the images of the pipeline with a GLASSScheduler."""
    pipe = make()
    out = steer(pipe, reward_scale=0)
    pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler, num_transitions=3)
    plain = pipe("a cat", num_images_per_prompt=4, generator=tiny.seeded(), output_type="np", **call(pipe)).images
    assert np.array_equal(out.images, plain[out.order[0]])


def test_result():
    pipe = tiny.flux()
    out = steer(pipe, ["a cat", "a dog"], reward_scale=1, ess_threshold=1)
    assert out.rewards.shape == out.log_weights.shape == out.order.shape == (2, 4)
    assert out.ancestors.shape == (2, 2, 4)
    assert out.ess.shape == (2, 2)
    assert out.log_evidence.shape == (2,)
    assert out.rewards.dtype == out.log_weights.dtype == torch.float64
    assert out.ancestors.dtype == torch.int64
    assert ((out.ancestors >= 0) & (out.ancestors < 4)).all()
    torch.testing.assert_close(out.log_weights.exp().sum(-1), torch.ones(2, dtype=torch.float64))
    best_first = out.rewards.gather(1, out.order)
    assert (best_first.diff() <= 0).all()
    images = torch.from_numpy(out.images).permute(0, 3, 1, 2)
    torch.testing.assert_close(brightness(images, [""] * 8).double().view(2, 4), best_first, rtol=0, atol=1e-3)


def test_particles_descend_from_their_ancestors():
    """What is scored at one transition is resampled as recorded, and weights follow the filter's arithmetic."""
    scored = []

    def reward(images, prompts):
        scored.append(brightness(images, prompts).double().view(2, 4))
        return scored[-1].flatten()

    out = steer(tiny.flux(), ["a cat", "a dog"], reward=reward, reward_scale=1, ess_threshold=0.9)
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


def test_a_prompt_among_others_is_a_prompt_alone():
    pipe = tiny.flux()
    latents = torch.randn(8, 24, 16, generator=tiny.seeded())
    steerer = FeynmanKacSteerer(pipe, brightness, num_particles=4, num_transitions=3, ess_threshold=1)
    both = steerer(["a cat", "a dog"], latents=latents, output_type="np", **call(pipe))
    one = steerer("a dog", latents=latents[4:], output_type="np", **call(pipe))
    assert torch.equal(both.ancestors[:, 1:], one.ancestors)
    np.testing.assert_allclose(both.images[4:], one.images, atol=2e-5)


def test_same_seed_same_result():
    pipe = tiny.flux()
    one, two, other = (steer(pipe, seed=seed, ess_threshold=1) for seed in (0, 0, 1))
    assert np.array_equal(one.images, two.images)
    assert torch.equal(one.log_evidence, two.log_evidence)
    assert not np.array_equal(one.images, other.images)


@pytest.mark.parametrize("make", PIPELINES)
def test_output_types(make):
    pipe = make()
    arrays = steer(pipe).images
    assert arrays.shape == (4, 16, 24, 3)
    pictures = steer(pipe, output_type="pil").images
    assert all(isinstance(picture, Image) for picture in pictures)
    np.testing.assert_allclose(np.stack([np.asarray(p) for p in pictures]) / 255, arrays, atol=0.51 / 255)
    tensors = steer(pipe, output_type="pt").images
    np.testing.assert_array_equal(tensors.permute(0, 2, 3, 1).numpy(), arrays)
    latents = steer(pipe, output_type="latent")
    assert len(latents.images) == 4
    np.testing.assert_allclose(latents.rewards, steer(pipe).rewards, atol=1e-3)


def test_decode_overrides_what_the_reward_sees():
    pipe = tiny.sd()
    seen = []

    def decode(latents):
        assert latents.shape == (4, 4, 8, 12)
        seen.append(latents)
        return torch.full((4, 3, 16, 24), 0.5)

    out = steer(pipe, decode=decode)
    assert len(seen) == 2
    assert out.images.std() > 0.01  # the pipeline's own images


def test_decode_may_write_into_its_input():
    def decode(latents):
        latents.mul_(0)
        return torch.full((4, 3, 16, 24), 0.5)

    pipe = tiny.sd()
    spoilt, plain = steer(pipe, decode=decode, reward_scale=0), steer(pipe, reward_scale=0)
    assert np.array_equal(spoilt.images[spoilt.order[0].argsort()], plain.images[plain.order[0].argsort()])


def test_half_precision_pipelines():
    """Latents reach `decode` in the pipeline's own dtype, rewards in float32."""
    pipe, seen = tiny.flux().to(torch.bfloat16), []
    latents = torch.randn(4, 24, 16, generator=tiny.seeded()).bfloat16()
    own = decoder(PipelineCall(pipe, tiny.FLUX_CALL))
    steerer = FeynmanKacSteerer(pipe, brightness, 4, decode=lambda z: seen.append(z.dtype) or own(z), num_transitions=3)
    out = steerer("a cat", latents=latents, output_type="np", **call(pipe))
    assert seen == [torch.bfloat16] * 2
    assert np.isfinite(out.images).all()


def test_negative_prompts_and_guidance():
    """A single prompt stays a string, as the pipeline was given it: its negative prompt may be one too."""
    for pipe, guidance in ((tiny.sd(), {"guidance_scale": 4.0}), (tiny.flux(), {"true_cfg_scale": 4.0})):
        steerer = FeynmanKacSteerer(pipe, brightness, 3, num_transitions=3)
        out = steerer("a cat", negative_prompt="a dog", output_type="np", **guidance, **call(pipe))
        assert out.images.shape == (3, 16, 24, 3)


def test_image_to_image():
    pipe = tiny.flux_img2img()
    image = torch.rand(1, 3, 16, 24, generator=tiny.seeded(3))
    steerer = FeynmanKacSteerer(pipe, brightness, 3, num_transitions=3)
    out = steerer("a cat", image=image, strength=0.7, output_type="np", **(call(pipe) | {"num_inference_steps": 9}))
    assert out.ancestors.shape == (2, 1, 3)


def test_reward_scale_defaults_to_the_rewards_own():
    class Documented:
        reward_scale = 7.0

        def __call__(self, images, prompts):
            return brightness(images, prompts)

    pipe = tiny.flux()
    assert FeynmanKacSteerer(pipe, Documented()).reward_scale == 7
    assert FeynmanKacSteerer(pipe, Documented(), reward_scale=2).reward_scale == 2
    assert FeynmanKacSteerer(pipe, brightness).reward_scale == 1


@pytest.mark.parametrize("glass", [False, True])
def test_pipeline_is_restored(glass):
    pipe = tiny.flux()
    if glass:
        pipe.scheduler = GLASSScheduler.from_config(pipe.scheduler.config, num_transitions=2)
        pipe.scheduler.set_generator(tiny.seeded(5))
    before, config, plain = pipe.scheduler, dict(pipe.config), plain_images(pipe)

    def unchanged():
        assert pipe.scheduler is before
        assert dict(pipe.config) == config
        assert np.array_equal(plain_images(pipe), plain)

    steer(pipe)
    unchanged()
    for error in (RuntimeError("reward"), KeyboardInterrupt()):

        def fail(images, prompts, error=error):
            raise error

        with pytest.raises(type(error)):
            steer(pipe, reward=fail)
        unchanged()
        with pytest.raises(type(error)):
            steer(pipe, decode=lambda latents: fail(latents, None))
        unchanged()


def plain_images(pipe):
    if isinstance(pipe.scheduler, GLASSScheduler):
        pipe.scheduler.set_generator(tiny.seeded(5))
    return pipe("a cat", generator=tiny.seeded(), output_type="np", **call(pipe)).images


def test_glass_scheduler_in_the_pipeline_keeps_its_options():
    pipe = tiny.flux()
    pipe.scheduler = GLASSScheduler.from_config(pipe.scheduler.config, num_transitions=2)
    assert len(steer(pipe, num_transitions=None).ancestors) == 1
    assert len(steer(pipe, num_transitions=4).ancestors) == 3


def test_one_transition_is_best_of_n():
    out = steer(tiny.flux(), num_transitions=1)
    assert out.ancestors.shape == (0, 1, 4)
    torch.testing.assert_close(out.log_weights, (out.rewards - out.rewards.logsumexp(-1, keepdim=True)))


def test_callbacks_and_progress_still_work():
    pipe, seen = tiny.flux(), []
    steerer = FeynmanKacSteerer(pipe, brightness, num_particles=2)
    steerer("a cat", callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(i) or {}, **call(pipe))
    assert seen == [*range(6)]


def test_bad_input():
    pipe = tiny.flux()
    cases = {
        r"shape \(4, 1\); expected one score per particle, shape \(4,\)": lambda images, prompts: images[:, :1, 0, 0],
        "expected finite scores": lambda images, prompts: [float("nan")] * 4,
    }
    for message, reward in cases.items():
        with pytest.raises(ValueError, match=message):
            steer(pipe, reward=reward)
    with pytest.raises(ValueError, match="num_images_per_prompt: expected 1 to num_particles=8, got 9"):
        FeynmanKacSteerer(pipe, brightness)("a cat", num_images_per_prompt=9)
    with pytest.raises(ValueError, match="select: expected one of .*, got 'worst'"):
        FeynmanKacSteerer(pipe, brightness)("a cat", select="worst")
    for options in ({"start": 0.8, "stop": 0.2}, {"score_every": 0}, {"decode_batch_size": -1}, {"potential": "min"},
                    {"resampling": "best"}, {"reward_scale": float("nan")}, {"reward_scale": "large"}):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            FeynmanKacSteerer(pipe, brightness, **options)
    with pytest.raises(ValueError, match="reward_scale: expected one per transition, 3, got a list of 2"):
        steer(pipe, reward_scale=[1.0, 2.0])
    with pytest.raises(ValueError, match="potential returned .*; expected finite values, one per particle"):
        steer(pipe, potential=lambda scaled: scaled[-1] / 0)
    with pytest.raises(ValueError, match="output_type"):
        steer(pipe, output_type="jpeg")
    with pytest.raises(ValueError, match="num_particles: expected at least 1, got 0"):
        FeynmanKacSteerer(pipe, brightness, num_particles=0)
    with pytest.raises(ValueError, match="ess_threshold: expected a fraction"):
        FeynmanKacSteerer(pipe, brightness, ess_threshold=4)
    pipe.scheduler = LCMScheduler()
    with pytest.raises(ValueError, match="LCMScheduler, which has no GLASS counterpart"):
        FeynmanKacSteerer(pipe, brightness)


def test_unknown_keywords_reach_the_pipeline():
    pipe = tiny.flux()
    with pytest.raises(TypeError, match="num_inference_stepz"):
        FeynmanKacSteerer(pipe, brightness)("a cat", num_inference_stepz=4)
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)


def test_unknown_pipelines_ask_for_decode():
    class Unknown(DiffusionPipeline):
        def __init__(self, scheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)

        def __call__(self, prompt, num_images_per_prompt=1, output_type="pil"):
            raise AssertionError("never reached")

    pipe = Unknown(DDIMScheduler())
    with pytest.raises(ValueError, match="do not know how Unknown .*pass decode="):
        FeynmanKacSteerer(pipe, brightness)("a cat")
    assert isinstance(pipe.scheduler, DDIMScheduler)


# ---- what is scored, when and how much it counts ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "transitions"),
    [
        ({}, (1, 2, 3, 4, 5)),
        ({"score_every": 2}, (1, 3, 5)),
        ({"start": 0.3, "stop": 0.7}, (2, 3, 4)),
        ({"start": 1}, ()),
    ],
)
def test_when_it_is_scored(options, transitions):
    out = steer(tiny.flux(), num_transitions=6, reward_scale=1, **options)
    assert out.transitions == transitions
    assert out.ledger.decodes == 4 * len(transitions)
    assert out.ledger.reward_calls == 4 * (len(transitions) + 1)  # the final images, too
    assert out.ledger.network_calls == 24


@pytest.mark.parametrize("potential", ["difference", "max", "sum", lambda scaled: 0.3 * scaled[-1]])
@pytest.mark.parametrize("scale", [1.0, [0.1, 0.5, 1.0], lambda done: done])
def test_weights_sum_to_the_final_reward(potential, scale):
    """Without resampling the final weights are exp(λ r), whatever the potential and the schedule."""
    out = steer(tiny.flux(), potential=potential, reward_scale=scale, ess_threshold=0)
    torch.testing.assert_close(out.log_weights, normalise(out.rewards))
    torch.testing.assert_close(out.log_evidence, log_mean(out.rewards))
    assert out.reward_scale.tolist() == [1.0]
    assert not out.resampled.any()


def test_automatic_scale():
    """Chosen for each prompt at the first scoring: half of the particles stay effective; kept, and told."""
    out = steer(tiny.flux(), ["a cat", "a dog"], num_particles=6, reward_scale="auto", ess_threshold=0)
    np.testing.assert_allclose(out.ess[0], 3.0, rtol=1e-6)
    np.testing.assert_allclose(ess(out.reward_scale[:, None] * out.scored[0]), 3.0, rtol=1e-6)
    torch.testing.assert_close(out.log_weights, normalise(out.reward_scale[:, None] * out.rewards))
    constant = steer(tiny.flux(), reward=lambda images, prompts: torch.ones(4), reward_scale="auto", ess_threshold=1)
    assert constant.reward_scale.tolist() == [0.0]
    assert not constant.resampled.any()


def test_a_scale_that_does_nothing_is_noticed_once():
    with pytest.warns(UserWarning, match=r"leaves the weights within 0\.\d% of uniform.* About [\d.e+]+ would leave"):
        steer(tiny.flux(), reward_scale=1e-6)


def test_batches_of_decoding_and_scoring_change_nothing():
    seen = []

    def counting(images, prompts):
        seen.append(len(images))
        return brightness(images, prompts)

    whole = steer(tiny.flux(), ["a cat", "a dog"], reward_scale=1, ess_threshold=1)
    parts = steer(
        tiny.flux(), ["a cat", "a dog"], reward=counting, reward_scale=1, ess_threshold=1, decode_batch_size=3,
        reward_batch_size=5,
    )  # fmt: skip
    assert seen == [5, 3] * 3
    torch.testing.assert_close(parts.rewards, whole.rewards, rtol=0, atol=1e-3)
    assert torch.equal(parts.ancestors, whole.ancestors)
    assert vars(parts.ledger).keys() == {"network_calls", "decodes", "reward_calls", "seconds"}
    assert parts.ledger.seconds["total"] > parts.ledger.seconds["decode"] > 0


# ---- what comes back -------------------------------------------------------------------------------------------------


def test_selection():
    pipe = tiny.flux()
    steerer = FeynmanKacSteerer(pipe, brightness, 4, num_transitions=3, reward_scale=1)
    arguments = {"generator": tiny.seeded(), "output_type": "np", **call(pipe)}
    everything = steerer(["a cat", "a dog"], **arguments)
    best = steerer(["a cat", "a dog"], select="best", **arguments | {"generator": tiny.seeded()})
    two = steerer(["a cat", "a dog"], num_images_per_prompt=2, **arguments | {"generator": tiny.seeded()})
    assert np.array_equal(best.images, everything.images[[0, 4]])
    assert np.array_equal(two.images, everything.images[[0, 1, 4, 5]])
    assert two.order.tolist() == everything.order[:, :2].tolist()
    drawn = steerer(["a cat", "a dog"], select="sample", **arguments | {"generator": tiny.seeded()})
    by_slot = everything.images.reshape(2, 4, 16, 24, 3)
    for prompt in range(2):
        slots = {int(slot): i for i, slot in enumerate(everything.order[prompt])}
        for i, slot in enumerate(drawn.order[prompt].tolist()):
            assert np.array_equal(drawn.images[4 * prompt + i], by_slot[prompt, slots[slot]])
    images, result = steerer("a cat", return_dict=False, **arguments)
    assert images is result.images


def test_selected_samples_follow_the_weights():
    from glassflows.steering.population import drawn_slots

    log_weights = torch.tensor([[0.1, 0.2, 0.7]], dtype=torch.float64).log()
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([drawn_slots(log_weights, generator, 1) for _ in range(3000)])
    np.testing.assert_allclose(torch.bincount(draws.flatten()) / 3000, [0.1, 0.2, 0.7], atol=0.03)


def test_a_generator_per_prompt():
    """A prompt's particles depend on its own generator, and part ways."""
    pipe = tiny.flux()
    steerer = FeynmanKacSteerer(pipe, brightness, 3, num_transitions=3)
    prompts = ["a cat", "a dog"]
    both = steerer(prompts, generator=[tiny.seeded(0), tiny.seeded(1)], output_type="np", **call(pipe))
    other = steerer(prompts, generator=[tiny.seeded(7), tiny.seeded(1)], output_type="np", **call(pipe))
    assert np.array_equal(both.images[3:], other.images[3:])
    assert not np.array_equal(both.images[:3], other.images[:3])
    assert np.abs(np.diff(both.images[:3], axis=0)).max() > 1e-3


def test_killed_in_the_middle_the_pipeline_draws_as_before():
    pipe = tiny.flux()
    expected = pipe("a cat", generator=tiny.seeded(), output_type="np", **call(pipe)).images

    def killed(images, prompts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steer(pipe, reward=killed)
    assert np.array_equal(pipe("a cat", generator=tiny.seeded(), output_type="np", **call(pipe)).images, expected)
    assert not {"prepare_latents", "progress_bar"} & vars(pipe).keys()


def test_callbacks_and_interrupts_are_the_users():
    pipe, seen = tiny.flux(), []

    def stop(pipe, i, t, kwargs):
        seen.append(kwargs["latents"].shape)
        pipe._interrupt = i == 3
        return kwargs

    steerer = FeynmanKacSteerer(pipe, brightness, 4, num_transitions=3, reward_scale=1)
    out = steerer("a cat", callback_on_step_end=stop, generator=tiny.seeded(), output_type="np", **call(pipe))
    assert seen == [(4, 24, 16)] * 4
    assert out.ledger.network_calls == 16
    assert out.transitions == (1,)
    assert np.isfinite(out.images).all()


def test_progress(capsys):
    pipe = tiny.flux()
    pipe.set_progress_bar_config(disable=False)
    steer(pipe, reward_scale=1)
    bar = capsys.readouterr().err
    assert "reward=" in bar
    assert "ess=" in bar
    pipe.set_progress_bar_config(disable=True)
    steer(pipe, reward_scale=1)
    assert capsys.readouterr().err == ""


def test_a_result_is_saved_with_what_reproduces_it(tmp_path):
    out = steer(tiny.flux(), reward_scale=2, output_type="pil", ess_threshold=1)
    folder = out.save(tmp_path / "run")
    record = json.loads((folder / "steering.json").read_text())
    assert record["images"] == ["000.png", "001.png", "002.png", "003.png"]
    assert np.array_equal(np.asarray(open_image(folder / "000.png")), np.asarray(out.images[0]))
    assert torch.equal(torch.tensor(record["rewards"], dtype=torch.float64), out.rewards)
    assert record["recipe"]["call"]["prompt"] == "a cat"
    assert record["recipe"]["call"]["generator"] == {"seed": 0, "device": "cpu"}
    assert record["recipe"]["steerer"]["reward_scale"] == 2
    assert record["recipe"]["scheduler"]["glass"]["num_transitions"] == 3
    assert record["recipe"]["versions"]["diffusers"]
    assert record["ledger"]["network_calls"] == 24
    assert out._repr_html_().count("<img") == 4
    assert "Infinity" not in (folder / "steering.json").read_text()
    latents = steer(tiny.flux(), reward_scale=2, output_type="latent")
    assert latents._repr_html_().startswith("<pre>")
    assert np.load(latents.save(tmp_path / "latents") / "samples.npy").shape == (4, 24, 16)


@pytest.mark.parametrize("given", ["a generator drawn from", "none"])
def test_a_saved_state_reproduces_the_call(given, tmp_path):
    """Whatever was drawn before from the generator, or from torch's own where the call names none."""
    pipe = tiny.flux()
    steerer = FeynmanKacSteerer(pipe, brightness, 4, num_transitions=3, reward_scale=1)
    generator = torch.default_generator.manual_seed(3) if given == "none" else tiny.seeded()
    torch.randn(7, generator=generator)
    named = {} if given == "none" else {"generator": generator}
    out = steerer("a cat", output_type="np", **named, **call(pipe))
    recipe = json.loads((out.save(tmp_path) / "steering.json").read_text())["recipe"]
    written = recipe["call"]["global_generator" if given == "none" else "generator"]
    state = torch.frombuffer(bytearray(base64.b64decode(written["state"])), dtype=torch.uint8)
    again = steerer("a cat", output_type="np", generator=tiny.seeded().set_state(state), **call(pipe))
    assert np.array_equal(again.images, out.images)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_videos_are_saved_and_shown_as_animations(output_type, tmp_path):
    film = np.random.default_rng(0).random((2, 5, 8, 12, 3), dtype=np.float32)
    rows = torch.tensor([0, 1])
    out = steer(tiny.flux(), num_particles=2, reward_scale=1, previews=True)
    previews = (255 * torch.from_numpy(film)[None]).round().byte().movedim(-1, -3)
    out = dataclasses.replace(
        out, images=rows_of_output(film, rows, output_type), previews=previews.repeat(2, 1, 1, 1, 1, 1)
    )
    folder = out.save(tmp_path)
    with open_image(folder / "001.png") as saved:
        assert saved.n_frames == 5
        saved.seek(3)
        np.testing.assert_allclose(np.asarray(saved.convert("RGB")) / 255, film[1, 3], atol=0.51 / 255)
    assert out._repr_html_().count("<img") == 2
    plt.close(out.plot())


@pytest.mark.parametrize("select", ["best", "sample"])
def test_genealogy_of_what_was_not_returned(select):
    pipe = tiny.flux()
    steerer = FeynmanKacSteerer(pipe, brightness, 4, num_transitions=3, reward_scale=50, previews=True)
    plt.close(steerer("a cat", generator=tiny.seeded(), select=select, **call(pipe)).plot())


@pytest.mark.parametrize(("particles", "transitions"), [(1, 2), (14, 2), (2, 1)])
def test_genealogies_of_every_size(particles, transitions):
    out = steer(tiny.flux(), num_particles=particles, num_transitions=transitions, previews=True, reward_scale=1)
    figure = out.plot()
    figure.canvas.draw()
    assert figure.get_figwidth() < 12
    plt.close(figure)


@pytest.mark.parametrize("previews", [False, True])
def test_genealogy(previews, tmp_path):
    out = steer(tiny.flux(), ["a cat", "a dog"], reward_scale=1, ess_threshold=1, previews=previews, output_type="pil")
    for prompt in range(2):
        lineage = out.lineage(prompt)
        assert lineage[-1] == int(out.order[prompt, 0])
        for row, (parent, slot) in enumerate(pairwise(lineage)):
            assert int(out.ancestors[row, prompt, slot]) == parent
        figure = out.plot(prompt)
        figure.savefig(tmp_path / "genealogy.png", dpi=50)
        plt.close(figure)
    assert (out.previews is not None) == previews
    if previews:
        assert out.previews.shape == (2, 8, 3, 16, 24)


# ---- rewards of every kind -------------------------------------------------------------------------------------------


def test_rewards_of_latents():
    """Nothing is decoded; the final latents are those of the last step, whatever comes back."""
    pipe, seen = tiny.sd(), []

    def reward(latents, prompts):
        seen.append(latents)
        return latents.mean((1, 2, 3))

    out = steer(pipe, reward=reward, decode="latents", reward_scale=1)
    assert [one.shape for one in seen] == [(4, 4, 8, 12)] * 3
    assert out.images.shape == (4, 16, 24, 3)
    same = steer(pipe, reward=reward, decode="latents", reward_scale=1, output_type="latent")
    by_slot = same.images[same.order[0].argsort()]
    torch.testing.assert_close(by_slot, seen[-1])
    torch.testing.assert_close(out.rewards, same.rewards)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64, "list", "numpy"])
def test_scores_of_every_kind(kind):
    def reward(images, prompts):
        scores = torch.tensor([0.0, 1.0, 2.0, 4.0]).requires_grad_()
        if kind == "list":
            return scores.tolist()
        return scores.detach().numpy() if kind == "numpy" else scores.to(kind)

    out = steer(tiny.flux(), reward=reward, reward_scale=1, ess_threshold=0)
    assert out.rewards.tolist() == [[0, 1, 2, 4]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_numbers(value):
    pipe = tiny.flux()
    with pytest.raises(ValueError, match="expected finite scores"):
        steer(pipe, reward=lambda images, prompts: [0.0, value, 0.0, 0.0])
    assert steer(pipe).rewards.isfinite().all()


def test_a_reward_that_raises_passes_through():
    class Mine(Exception):
        pass

    def reward(images, prompts):
        raise Mine

    pipe = tiny.flux()
    native = pipe.scheduler
    with pytest.raises(Mine):
        steer(pipe, reward=reward)
    assert pipe.scheduler is native


def test_one_particle_is_a_plain_image():
    pipe = tiny.flux()
    out = steer(pipe, num_particles=1, reward_scale=3)
    pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler, num_transitions=3)
    plain = pipe("a cat", generator=tiny.seeded(), output_type="np", **call(pipe)).images
    assert np.array_equal(out.images, plain)
    assert not out.resampled.any()


def test_pictures_are_scored_by_an_adapter():
    def redness(pictures, prompts):
        return [np.asarray(picture)[..., 0].mean() for picture in pictures]

    out = steer(tiny.flux(), reward=as_reward(redness), reward_scale=1)
    expected = 255 * out.images[..., 0].mean((1, 2))
    np.testing.assert_allclose(out.rewards.gather(1, out.order)[0], expected, atol=0.6)


# ---- what an independent reading found -------------------------------------------------------------------------------


def images_noised(pipe, image, monkeypatch, **options):
    """Return the mean of the encoded image that each row starts from."""
    seen, add_noise = [], GLASSScheduler.add_noise

    def noting(self, z, *args):
        seen.append(z.flatten(1).mean(1))
        return add_noise(self, z, *args)

    monkeypatch.setattr(GLASSScheduler, "add_noise", noting)
    steerer = FeynmanKacSteerer(pipe, brightness, 2, num_transitions=2)
    steerer(["a cat", "a dog"], image=image, strength=0.5, generator=tiny.seeded(), output_type="np", **call(pipe))
    return seen[0].view(2, 2)


@pytest.mark.parametrize("make", [tiny.sd_img2img, tiny.flux_img2img])
@pytest.mark.parametrize("kind", ["pil", "array", "list of arrays", "tensor"])
def test_an_image_for_each_prompt_of_every_kind(make, kind, monkeypatch):
    """Rows 0 and 1 start from the first prompt's image, rows 2 and 3 from the other's."""

    def images(*values):
        arrays = np.stack([np.full((16, 24, 3), value, np.float32) for value in values])
        pictures = [from_array((255 * array).astype(np.uint8)) for array in arrays]
        tensor = torch.from_numpy(arrays).movedim(-1, 1)
        return {"pil": pictures, "array": arrays, "list of arrays": [*arrays], "tensor": tensor}[kind]

    means, second = (images_noised(make(), images(0, value), monkeypatch) for value in (0, 1))
    assert torch.equal(means[0], second[0])
    assert (means[1] - second[1]).abs().min() > 1e-5


def test_as_many_images_as_prompts_or_one():
    pipe, image = tiny.sd_img2img(), torch.rand(4, 3, 16, 24, generator=tiny.seeded())
    with pytest.raises(ValueError, match="image: expected one, or one for each prompt, 2, got 4"):
        FeynmanKacSteerer(pipe, brightness, 2)(["a cat", "a dog"], image=image, strength=0.5, **call(pipe))


def test_a_list_of_images_is_one_for_each_control_network():
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
    from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

    base = tiny.sd()
    network = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 8)).eval()
    parts = {**base.components, "controlnet": MultiControlNetModel([network, network])}
    pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pictures = [from_array(np.full((16, 24, 3), value, np.uint8)) for value in (0, 255)]
    out = FeynmanKacSteerer(pipe, brightness, 3)(["a cat", "a dog"], image=pictures, output_type="np", **call(pipe))
    assert out.rewards.shape == (2, 3)


def test_rewards_may_write_into_what_they_get():
    def normalising(images, prompts):
        scores = brightness(images, prompts)
        images.sub_(0.5).div_(0.5)
        return scores

    for output_type in ("np", "pt", "latent"):
        spoilt = steer(tiny.flux(), reward=normalising, output_type=output_type, reward_scale=1)
        plain = steer(tiny.flux(), output_type=output_type, reward_scale=1)
        assert np.array_equal(np.asarray(spoilt.images), np.asarray(plain.images))


def test_no_reward_is_scored_with_gradients():
    seen = []
    steer(tiny.flux(), reward=lambda images, prompts: seen.append(torch.is_grad_enabled()) or [0.0] * 4)
    assert seen == [False] * 3


@pytest.mark.parametrize("particles", [2, 4])
def test_the_automatic_scale_steers_few_and_tied_particles(particles):
    rewards = [0.0, 1.0, 1.0, 1.0][:particles]
    out = steer(tiny.flux(), num_particles=particles, reward=lambda images, prompts: rewards, reward_scale="auto")
    assert (out.reward_scale > 0).all()
    with pytest.warns(UserWarning, match=r"About -\d[\d.e+]* would leave"):
        steer(tiny.flux(), num_particles=particles, reward=lambda images, prompts: rewards, reward_scale=-1e-6)


def test_the_ledger_adds_up():
    """The last scoring too is within the total; latents are not decoded."""

    def slow(images, prompts):
        time.sleep(0.05)
        return [0.0, 1.0, 2.0, 3.0]

    for options in ({}, {"num_transitions": 1}, {"output_type": "latent"}):
        ledger = steer(tiny.flux(), reward=slow, reward_scale=1, **options).ledger
        seconds = dict(ledger.seconds)
        assert seconds.pop("total") > sum(seconds.values())
    assert ledger.decodes == 12  # the final ones for the reward
    assert steer(tiny.sd(), reward=slow, decode="latents", reward_scale=1).ledger.decodes == 0


def test_final_latents_are_decoded_in_batches_too():
    pipe, sizes = tiny.sd(), []
    decode = decoder(PipelineCall(pipe, {}))
    steer(pipe, decode=lambda z: sizes.append(len(z)) or decode(z), decode_batch_size=3, output_type="latent")
    assert sizes == [3, 1] * 3


def test_the_recipe_holds_what_was_asked_for():
    pipe = tiny.flux()
    steerer = FeynmanKacSteerer(pipe, brightness, 4, potential="max", resampling="ssp", reward_scale=np.float32(3.5))
    given = {"joint_attention_kwargs": {"scale": 1}, "sigmas": np.linspace(1, 0.2, 6)}
    out = steerer("a cat", num_images_per_prompt=2, **given, **call(pipe))
    recipe = json.loads(json.dumps(out.recipe))
    assert recipe["steerer"] | {"potential": "max", "resampling": "ssp", "reward_scale": 3.5} == recipe["steerer"]
    assert recipe["call"]["num_images_per_prompt"] == 2
    fresh = steerer(["a cat", "a dog"], generator=[tiny.seeded(1), tiny.seeded(2)], **call(pipe)).recipe
    assert fresh["call"]["generator"] == [{"seed": 1, "device": "cpu"}, {"seed": 2, "device": "cpu"}]
    assert recipe["call"]["joint_attention_kwargs"] == {"scale": 1}
    np.testing.assert_allclose(recipe["call"]["sigmas"], given["sigmas"])
    FeynmanKacSteerer(pipe, brightness, **{k: v for k, v in recipe["steerer"].items() if k != "options"})


def test_previews_are_what_the_reward_saw():
    seen = []

    def reward(images, prompts):
        seen.append(images.clone())
        return brightness(images, prompts)

    out = steer(tiny.flux(), reward=reward, reward_scale=1, previews=True)
    torch.testing.assert_close(out.previews / 255, torch.stack(seen[:-1]), rtol=0, atol=0.51 / 255)
    bright = torch.full((4, 3, 16, 24), 1.004)
    out = steer(tiny.flux(), reward=lambda images, prompts: [0.0] * 4, decode=lambda z: bright, previews=True)
    assert (out.previews == 255).all()
    out = steer(tiny.sd(), reward=lambda z, p: z.mean((1, 2, 3)), decode="latents", previews=True, reward_scale=1)
    assert out.previews.min() < 0


@pytest.mark.parametrize("scale", [lambda done: math.nan if done == 1 else 1.0, lambda done: math.nan, 1e308])
def test_scales_that_are_no_numbers(scale):
    with pytest.raises(ValueError, match="reward_scale=.* times rewards .* is not finite"):
        steer(tiny.flux(), reward_scale=scale)


def test_schedules_are_followed():
    """On the way too: without resampling the ESS is that of λ_k r_k, of a list, an array and a function."""
    scales = [2.0, 5.0, 8.0]
    for given in (scales, np.array(scales), torch.tensor(scales), lambda done: scales[round(3 * done) - 1]):
        out = steer(tiny.flux(), reward_scale=given, ess_threshold=0)
        weights = torch.tensor(scales[:2], dtype=torch.float64)[:, None, None] * out.scored
        np.testing.assert_allclose(out.ess, ess(weights), rtol=1e-5)
        assert out.reward_scale.tolist() == [8]


def test_the_scheme_that_was_named_is_used(monkeypatch):
    from glassflows.smc import resampling

    def last(log_weights, generators):
        return torch.full(log_weights.shape, 3)

    monkeypatch.setitem(resampling.RESAMPLING, "ssp", last)
    out = steer(tiny.flux(), resampling="ssp", ess_threshold=1, reward_scale=1)
    assert (out.ancestors == 3).all()


def test_the_window_includes_its_ends():
    assert steer(tiny.flux(), num_transitions=6, start=0.5, stop=0.5, reward_scale=1).transitions == (3,)


def test_the_scale_that_is_suggested_leaves_half():
    with pytest.warns(UserWarning, match="would leave half") as caught:
        out = steer(tiny.flux(), reward_scale=1e-6)
    better = float(re.search(r"About ([\d.e+-]+) would", str(caught[0].message))[1])
    assert ess(better * out.scored[0]).item() == pytest.approx(2, rel=0.02)


def test_the_bar_shows_the_best_reward(monkeypatch):
    shown, pipe = [], tiny.flux()
    monkeypatch.setattr(PipelineRun, "show", lambda self, **values: shown.append(values))
    out = steer(pipe, reward_scale=1)
    assert [float(one["reward"]) for one in shown] == pytest.approx(out.scored.amax((1, 2)).tolist(), rel=1e-3)
    assert [float(one["ess"]) for one in shown] == pytest.approx(out.ess.mean(1).tolist(), abs=0.06)


def test_samples_are_drawn_by_the_final_weights():
    """Of a reward that leaves one particle all the weight."""
    out = FeynmanKacSteerer(tiny.flux(), lambda images, prompts: [0.0, 0.0, 1e4, 0.0], 4, ess_threshold=0)(
        "a cat", select="sample", generator=tiny.seeded(), **call(tiny.flux())
    )
    assert out.order.tolist() == [[2, 2, 2, 2]]
    assert out.image_rewards.tolist() == [1e4] * 4


def test_interrupted_before_the_first_step():
    pipe = tiny.flux()
    encode = pipe.encode_prompt

    def stopping(*args, **kwargs):
        pipe._interrupt = True
        return encode(*args, **kwargs)

    pipe.encode_prompt = stopping
    out = steer(pipe, reward_scale=1)
    assert out.interrupted
    assert len(out.images) == 4
    assert out.transitions == ()
    assert not steer(tiny.flux()).interrupted


def test_pipelines_that_hand_their_call_to_others():
    class Combined(DiffusionPipeline):
        def __init__(self, scheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)
            self.decoder_pipe = None

    class Unnamed(DiffusionPipeline):
        def __init__(self, decoder_scheduler):
            super().__init__()
            self.register_modules(decoder_scheduler=decoder_scheduler)

    with pytest.raises(ValueError, match="it hands its call to others: steer pipe.decoder_pipe"):
        FeynmanKacSteerer(Combined(DDIMScheduler()), brightness)
    with pytest.raises(ValueError, match="it has no component named scheduler"):
        FeynmanKacSteerer(Unnamed(DDIMScheduler()), brightness)


def test_one_particle_with_its_own_generator_is_the_plain_image():
    pipe = tiny.flux()
    given, listed = (steer_one(pipe, generator) for generator in (tiny.seeded(), [tiny.seeded()]))
    assert np.array_equal(given, listed)


def steer_one(pipe, generator):
    return FeynmanKacSteerer(pipe, brightness, 1)("a cat", generator=generator, output_type="np", **call(pipe)).images


def test_prompts_in_a_tuple_and_counts_of_none():
    out = FeynmanKacSteerer(tiny.flux(), brightness, 2)(
        ("a cat", "a <dog>"), num_images_per_prompt=None, **call(tiny.flux())
    )
    assert len(out.images) == 4
    assert "<p>a &lt;dog&gt;</p>" in out._repr_html_()
    for reward, message in ((None, "reward: expected a function"), (lambda i, p: None, "reward returned None")):
        with pytest.raises(ValueError, match=message):
            steer(tiny.flux(), reward=reward)


# ---- what is promised in so many words -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e4, -3.0, "auto", [0.1, 1.0, 10.0]])
@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_a_prompt_of_constant_reward_is_never_resampled(scale, potential):
    def reward(images, prompts):
        bright = brightness(images, prompts)
        return [0.1 if prompt == "a dog" else float(score) for prompt, score in zip(prompts, bright, strict=True)]

    out = steer(
        tiny.flux(), ["a cat", "a dog"], reward=reward, reward_scale=scale, potential=potential, ess_threshold=1.0
    )
    assert not out.resampled[:, 1].any()
    assert out.resampled[:, 0].any()
    assert (out.ancestors[:, 1] == torch.arange(4)).all()
    torch.testing.assert_close(out.log_weights[1].exp(), torch.full((4,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("make", PIPELINES)
def test_sliced_and_tiled_decoders(make):
    plain, pipe = steer(make(), reward_scale=1, ess_threshold=1), make()
    pipe.vae.enable_slicing()
    sliced = steer(pipe, reward_scale=1, ess_threshold=1, decode_batch_size=3)
    by_slot = [out.images[out.order[0].argsort()] for out in (sliced, plain)]
    np.testing.assert_allclose(*by_slot, atol=5e-5)
    pipe.vae.enable_tiling()  # which blends tiles: other images, scored as they are returned
    tiled = steer(pipe, reward_scale=1, ess_threshold=1, decode_batch_size=3)
    images = torch.from_numpy(tiled.images).movedim(-1, 1)
    torch.testing.assert_close(brightness(images, [""] * 4).double(), tiled.image_rewards, rtol=0, atol=1e-3)
    assert np.abs(tiled.images - plain.images).max() > 1e-3
