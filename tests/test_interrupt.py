"""An interrupted call returns what was last predicted, decoded and scored."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

import tiny
from glassflows import FeynmanKacSteerer, GLASSScheduler
from glassflows.host.decode import PipelineCall, decoder
from glassflows.host.outputs import channels_first, channels_last
from zoo import wan


def interrupted(toy, after, **kwargs):
    """Return the result of a call that is interrupted after a number of steps, and the predictions it made."""
    toy.glass(3)
    predicted = []

    def stopping(call, z):
        predicted.append(z)
        if call.index + 1 == after:
            toy.pipe._interrupt = True

    toy.pipe.scheduler.on_denoised = stopping
    return toy.steer(num_transitions=None, **kwargs), predicted


@pytest.mark.parametrize("after", [1, 2, 4, 5])
def test_the_images_are_the_last_predictions(toy, after):
    """Those of the last call, and none further denoised; scored as they are returned."""
    out, predicted = interrupted(toy, after, ess_threshold=0, reward_scale=1)
    assert out.interrupted
    assert len(predicted) == after
    assert out.ledger.network_calls == 4 * after
    expected = decoder(PipelineCall(toy.pipe, toy.call))(predicted[-1]).movedim(1, -1).detach().numpy()
    by_slot = out.images[out.order[0].argsort()]
    np.testing.assert_allclose(by_slot, expected, atol=1e-6)
    scores = tiny.brightness(torch.from_numpy(out.images).movedim(-1, 1), [""] * 4).double()
    torch.testing.assert_close(out.image_rewards, scores, rtol=0, atol=1e-3)
    assert (out.image_rewards.diff() <= 0).all()


def test_rows_that_were_moved_are_the_last(flux):
    """At a boundary the predictions of those that go on."""
    out, predicted = interrupted(flux, 5, ess_threshold=1, reward_scale=1)
    assert out.transitions == (1, 2)
    assert out.resampled.all()
    expected = predicted[-1][out.ancestors[-1, 0]]
    expected = decoder(PipelineCall(flux.pipe, flux.call))(expected).movedim(1, -1).detach().numpy()
    np.testing.assert_allclose(out.images[out.order[0].argsort()], expected, atol=1e-6)


def test_latents(toy):
    """For output_type="latent", and for a reward of latents, the predictions themselves."""
    out, predicted = interrupted(toy, 4, output_type="latent", ess_threshold=0)
    assert torch.equal(out.images[out.order[0].argsort()], predicted[-1])
    seen = []

    def reward(latents, prompts):
        seen.append(latents.clone())
        return latents.flatten(1).mean(1)

    out, predicted = interrupted(toy, 4, reward=reward, decode="latents", ess_threshold=0)
    assert torch.equal(seen[-1], predicted[-1])
    assert out.images.shape == (4, 16, 24, 3)


@pytest.mark.parametrize("output_type", ["pil", "pt", "np"])
def test_every_form(flux, output_type):
    out, _ = interrupted(flux, 4, output_type=output_type)
    full = flux.steer(output_type=output_type)
    assert type(out.images) is type(full.images)
    assert type(out.images[0]) is type(full.images[0])
    assert np.shape(out.images[0]) == np.shape(full.images[0])


def test_decoding_keeps_to_the_batch_size(flux):
    sizes, decode = [], flux.pipe.vae.decoder.forward

    def noting(z, *args, **kwargs):
        sizes.append(len(z))
        return decode(z, *args, **kwargs)

    flux.pipe.vae.decoder.forward = noting
    parts, _ = interrupted(flux, 2, decode_batch_size=3)
    assert max(sizes) == 3
    assert sizes[-2:] == [3, 1]
    whole, _ = interrupted(flux, 2)
    np.testing.assert_allclose(parts.images, whole.images, atol=5e-5)


def test_a_last_step_is_not_interrupted(toy):
    """What is asked for in the last step comes too late: the images are the pipeline's own."""
    full = toy.steer(reward_scale=0)
    out, _ = interrupted(toy, 6, reward_scale=0)
    assert not out.interrupted
    assert np.array_equal(out.images, full.images)


def test_the_denoised_and_the_own_decoder(flux):
    """A function that decodes for the reward alone says nothing of the images."""
    out, predicted = interrupted(flux, 4, decode=lambda z: torch.full((len(z), 3, 16, 24), 0.5), ess_threshold=0)
    expected = decoder(PipelineCall(flux.pipe, flux.call))(predicted[-1]).movedim(1, -1).detach().numpy()
    np.testing.assert_allclose(out.images[out.order[0].argsort()], expected, atol=1e-6)


class Unknown(DiffusionPipeline):
    """Draws from noise, in four steps, what no family of pipelines is known to decode."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def __call__(self, prompt, num_images_per_prompt=1, generator=None, output_type="np"):
        self._interrupt = False
        x = torch.randn(num_images_per_prompt, 3, 2, 2, generator=generator)
        self.scheduler.set_timesteps(4)
        for t in self.scheduler.timesteps:
            if not self._interrupt:
                x = self.scheduler.step(torch.tanh(x), t, x, return_dict=False)[0]
        return (x.movedim(1, -1).numpy(),)


@pytest.mark.parametrize("decode", [lambda z: z / 2, "latents"])
def test_pipelines_of_no_known_family(decode):
    """Are decoded as for the reward, if there is a function for that."""
    pipe, predicted = Unknown(DDIMScheduler(**tiny.SD_SCHEDULER)), []
    pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler, num_transitions=2)

    def stopping(call, z):
        predicted.append(z)
        pipe._interrupt = call.index == 2

    pipe.scheduler.on_denoised = stopping
    steerer = FeynmanKacSteerer(pipe, lambda z, p: z.flatten(1).mean(1), 2, decode=decode, ess_threshold=0)
    out = steerer("", generator=tiny.seeded(), output_type="np")
    by_slot = torch.from_numpy(out.images).movedim(-1, 1)[out.order[0].argsort()]
    seen = predicted[-1] if decode == "latents" else predicted[-1] / 2
    torch.testing.assert_close(out.rewards[0].float(), seen.mean((1, 2, 3)))
    if decode != "latents":
        torch.testing.assert_close(by_slot, predicted[-1] / 2)


@pytest.mark.slow
@tiny.DIFFUSERS_42
def test_videos():
    """In the shape of the pipeline's own, and denoised."""
    case = next(case for case in wan.CASES if case.label == "WanPipeline")
    options = {"num_particles": 2, "num_inference_steps": 5, "ess_threshold": 0, "reward": lambda films, _: [0.0] * 2}
    full = tiny.Toy(case.build, case.call()).steer(**options)
    toy = tiny.Toy(case.build, case.call())
    out, predicted = interrupted(toy, 3, **options)
    assert (full.interrupted, out.interrupted) == (False, True)
    assert out.images.shape == full.images.shape
    expected = decoder(PipelineCall(toy.pipe, case.call()))(predicted[-1]).movedim(2, -1).detach().numpy()
    np.testing.assert_allclose(out.images[out.order[0].argsort()], expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 8, 12, 3), (2, 5, 8, 12, 3), (2, 2, 100), (2, 1, 100), (2, 100)])
def test_samples_as_arrays(shape):
    """Channels first and back, for images, videos and sound with one channel or two, or with no axis for it."""
    arrays = np.random.default_rng(0).random(shape, dtype=np.float32)
    assert np.array_equal(channels_last(channels_first(arrays), arrays), arrays)


def test_interrupted_before_the_first_step(flux):
    encode = flux.pipe.encode_prompt

    def stopping(*args, **kwargs):
        flux.pipe._interrupt = True
        return encode(*args, **kwargs)

    flux.pipe.encode_prompt = stopping
    out = flux.steer()
    assert out.interrupted
    assert out.images.shape == (4, 16, 24, 3)
    assert out.ledger.network_calls == 0
    with pytest.raises(ValueError, match="interrupted before its first step: no latents yet"):
        flux.steer(decode="latents", reward=lambda z, p: [0.0] * 4)


def test_nothing_goes_past_a_safety_checker(sd):
    """Its pipeline's own images are returned, which it has judged."""
    judged = []

    def blank(images, device, dtype):
        judged.append(len(images))
        return torch.zeros_like(images), [True] * len(images)

    sd.pipe.safety_checker = sd.pipe.text_encoder  # any model: what judges is replaced
    sd.pipe.run_safety_checker = blank
    out, _ = interrupted(sd, 2)
    assert out.interrupted
    assert judged == [4]
    assert np.all(out.images == 0)
    assert out.others["nsfw_content_detected"] == [True] * 4
