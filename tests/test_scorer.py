"""Scorer: what the reward is given, in batches of which size, and which of its answers are scores."""

import re

import numpy as np
import pytest
import torch

import tiny
from glassflows.host.decode import PipelineCall, decoder
from glassflows.rewards import as_reward

GREY = torch.full((4, 3, 16, 24), 0.5)


def by_slot(out):
    """Return the images of a prompt in the order of their slots."""
    return out.images[out.order[0].argsort()]


# ---- what it is given ------------------------------------------------------------------------------------------------


def test_decode_overrides_what_the_reward_sees(sd):
    seen = []

    def decode(latents):
        assert latents.shape == (4, 4, 8, 12)
        seen.append(latents)
        return GREY

    out = sd.steer(decode=decode)
    assert len(seen) == 2
    assert out.images.std() > 0.01  # the pipeline's own images


def test_decode_may_write_into_its_input(sd):
    def decode(latents):
        latents.mul_(0)
        return GREY

    spoilt, plain = sd.steer(decode=decode, reward_scale=0), sd.steer(reward_scale=0)
    assert np.array_equal(by_slot(spoilt), by_slot(plain))


@pytest.mark.parametrize("output_type", ["np", "pt", "latent"])
def test_rewards_may_write_into_what_they_get(flux, output_type):
    def normalising(images, prompts):
        scores = tiny.brightness(images, prompts)
        images.sub_(0.5).div_(0.5)
        return scores

    spoilt = flux.steer(reward=normalising, output_type=output_type)
    plain = flux.steer(output_type=output_type)
    assert np.array_equal(np.asarray(spoilt.images), np.asarray(plain.images))


def test_half_precision_pipelines(flux):
    """Latents reach `decode` in the pipeline's own dtype, rewards in float32, as `tiny.brightness` checks."""
    flux.pipe.to(torch.bfloat16)
    latents, seen = flux.latents(4).bfloat16(), []
    own = decoder(PipelineCall(flux.pipe, flux.call))
    out = flux.steer(decode=lambda z: seen.append(z.dtype) or own(z), latents=latents, generator=None)
    assert seen == [torch.bfloat16] * 2
    assert np.isfinite(out.images).all()


def test_rewards_of_latents(sd):
    """Nothing is decoded; the final latents are those of the last step, whatever comes back."""
    seen = []

    def reward(latents, prompts):
        seen.append(latents)
        return latents.mean((1, 2, 3))

    out = sd.steer(reward=reward, decode="latents")
    assert [one.shape for one in seen] == [(4, 4, 8, 12)] * 3
    assert out.images.shape == (4, 16, 24, 3)
    same = sd.steer(reward=reward, decode="latents", output_type="latent")
    torch.testing.assert_close(by_slot(same), seen[-1])
    torch.testing.assert_close(out.rewards, same.rewards)


def test_pictures_are_scored_by_an_adapter(flux):
    def redness(pictures, prompts):
        return [np.asarray(picture)[..., 0].mean() for picture in pictures]

    out = flux.steer(reward=as_reward(redness))
    expected = 255 * out.images[..., 0].mean((1, 2))
    np.testing.assert_allclose(out.rewards.gather(1, out.order)[0], expected, atol=0.6)


def test_no_reward_is_scored_with_gradients(flux):
    seen = []
    flux.steer(reward=lambda images, prompts: seen.append(torch.is_grad_enabled()) or [0.0] * 4)
    assert seen == [False] * 3


# ---- in batches ------------------------------------------------------------------------------------------------------


def test_batches_of_decoding_and_scoring_change_nothing(flux):
    seen = []

    def counting(images, prompts):
        seen.append((len(images), prompts))
        return tiny.brightness(images, prompts)

    options = {"reward": counting, "reward_scale": 1, "ess_threshold": 1}
    whole = flux.steer(["a cat", "a dog"], **options)
    assert seen == [(8, ["a cat"] * 4 + ["a dog"] * 4)] * 3
    seen.clear()
    parts = flux.steer(["a cat", "a dog"], decode_batch_size=3, reward_batch_size=5, **options)
    assert seen == [(5, ["a cat"] * 4 + ["a dog"]), (3, ["a dog"] * 3)] * 3
    torch.testing.assert_close(parts.rewards, whole.rewards, rtol=0, atol=1e-3)
    assert torch.equal(parts.ancestors, whole.ancestors)


def test_final_latents_are_decoded_in_batches_too(sd):
    decode, sizes = decoder(PipelineCall(sd.pipe, {})), []
    sd.steer(decode=lambda z: sizes.append(len(z)) or decode(z), decode_batch_size=3, output_type="latent")
    assert sizes == [3, 1] * 3


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64, "list", "numpy"])
def test_scores_of_every_kind(flux, kind):
    def reward(images, prompts):
        scores = torch.tensor([0.0, 1.0, 2.0, 4.0]).requires_grad_()
        if kind == "list":
            return scores.tolist()
        return scores.detach().numpy() if kind == "numpy" else scores.to(kind)

    out = flux.steer(reward=reward, reward_scale=1, ess_threshold=0)
    assert out.rewards.tolist() == [[0, 1, 2, 4]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_numbers(flux, value):
    message = f"reward returned [0.0, {value}, 0.0, 0.0]; expected finite scores: check the images it was given"
    with pytest.raises(ValueError, match=re.escape(message)):
        flux.steer(reward=lambda images, prompts: [0.0, value, 0.0, 0.0])
    assert flux.steer().rewards.isfinite().all()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            lambda images, prompts: images[:, :1, 0, 0],
            "reward returned shape (4, 1); expected one score per particle, shape (4,)",
        ),
        (lambda images, prompts: None, "reward returned None; expected one score per particle"),
    ],
    ids=["shape", "none"],
)
def test_answers_that_are_no_scores(flux, reward, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        flux.steer(reward=reward)


@pytest.mark.parametrize("output_type", ["latent", "np"])
def test_a_decoder_may_write_into_what_it_gets(output_type):
    """Also at the end: the latents that are returned are as the pipeline drew them."""

    def decode(z):
        z *= 0
        return torch.rand(len(z), 3, 16, 24, generator=tiny.seeded())

    toy = tiny.Toy(tiny.sd)
    spoilt = toy.steer(decode=decode, output_type=output_type, reward_scale=0.0)
    plain = toy.steer(output_type=output_type, reward_scale=0.0)
    by_slot = [np.asarray(out.images)[out.order[0].argsort()] for out in (spoilt, plain)]
    assert np.array_equal(*by_slot)
