"""Predictions on the way seen by other eyes than the pipeline's own: a tiny decoder, or a smaller size."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderTiny

pytest.importorskip("diffusers", minversion="0.42")  # older ones build other pipelines

import tiny
from glassflows import Calibration, FeynmanKacSteerer
from glassflows.host.decode import PipelineCall, decoder
from zoo.survey import arguments, cases

EYED = ["FluxPipeline", "StableDiffusionPipeline", "QwenImagePipeline", "SanaPipeline", "Kandinsky5T2IPipeline"]


def level(samples, prompts):
    return samples.flatten(1).mean(1)


def tiny_decoder(channels, scale, seed=0):
    """Return an AutoencoderTiny with random weights."""
    torch.manual_seed(seed)
    blocks = 1 + int(np.log2(scale))
    depths = {f"{part}_block_out_channels": (8,) * blocks for part in ("encoder", "decoder")}
    numbers = {f"num_{part}_blocks": (1,) * blocks for part in ("encoder", "decoder")}
    return AutoencoderTiny(latent_channels=channels, **depths, **numbers).eval()


def for_toy(toy, seed=0):
    return tiny_decoder(toy.pipe.vae.config.latent_channels, toy.pipe.vae_scale_factor, seed)


def test_a_tiny_decoder_sees_predictions_and_no_final_sample(toy):
    vae, seen = for_toy(toy), []
    decode = vae.decode
    vae.decode = lambda latents, **options: seen.append(len(latents)) or decode(latents, **options)
    out = toy.steer(["a cat", "a dog"], preview_vae=vae, previews=True, decode_batch_size=3)
    assert seen == [3, 3, 2] * len(out.transitions)
    plain = toy.steer(["a cat", "a dog"], previews=True, reward_scale=0.0)
    assert (out.previews.float() - plain.previews.float()).abs().mean() > 5
    images = torch.from_numpy(out.images).movedim(-1, 1)
    torch.testing.assert_close(tiny.brightness(images, [""] * 8).double(), out.image_rewards, rtol=0, atol=1e-3)


def test_it_gets_latents_as_the_pipeline_s_own_gets_them(toy):
    """Scaled and shifted by its own config: a copy of the pipeline's autoencoder sees what that sees."""
    other = type(toy.pipe.vae).from_config(toy.pipe.vae.config).eval()
    other.load_state_dict(toy.pipe.vae.state_dict())
    out, plain = (toy.steer(previews=True, **options) for options in ({"preview_vae": other}, {}))
    assert torch.equal(out.previews, plain.previews)
    assert torch.equal(out.ancestors, plain.ancestors)


def test_a_tiny_decoder_takes_raw_latents(sd):
    vae = for_toy(sd)
    latents = sd.run(output_type="latent", num_images_per_prompt=3)
    with torch.no_grad():
        expected = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        seen = decoder(PipelineCall(sd.pipe, sd.call, preview_vae=vae))(latents)
    assert torch.equal(seen, expected)


def test_gradients_go_through_it(toy):
    """The twist is that of the preview; the weights stay those of the true images."""
    vae = for_toy(toy)
    options = {"twist": 2.0, "reward_scale": 5.0, "num_transitions": 3}
    out = toy.steer(preview_vae=vae, **options)
    other = toy.steer(preview_vae=for_toy(toy, seed=1), **options)
    assert out.ledger.gradients == other.ledger.gradients > 0
    assert not np.array_equal(out.images, other.images)
    assert vae.decoder.layers[0].weight.grad is None


@pytest.mark.parametrize("label", EYED)
def test_smaller(label):
    """At half the size; a size that is none the smaller changes nothing."""
    case = cases()[label]
    toy = tiny.Toy(case.build, {name: one for name, one in arguments(case).items() if name != "generator"})
    given = {"reward": level, "num_inference_steps": 4, "num_particles": 2, "num_transitions": 2, "reward_scale": 0.0}
    plain = toy.steer(previews=True, **given)
    height, width = plain.previews.shape[-2:]
    side = max(height, width)
    half = toy.steer(previews=True, preview_size=side // 2, **given)
    assert half.previews.shape == (*plain.previews.shape[:-2], height // 2, width // 2)
    np.testing.assert_array_equal(half.images, plain.images)
    whole = toy.steer(previews=True, preview_size=side, **given)
    assert torch.equal(whole.previews, plain.previews)


def test_smaller_is_averaged(flux):
    """Also what a function of one's own decodes; the reward is that of the smaller image."""
    own = decoder(PipelineCall(flux.pipe, flux.call))
    whole = flux.steer(previews=True, reward=level, reward_scale=0.0)
    side = max(whole.previews.shape[-2:])
    for decode in (None, own):
        half = flux.steer(previews=True, reward=level, reward_scale=0.0, preview_size=side // 2, decode=decode)
        pooled = torch.nn.functional.avg_pool2d(whole.previews.float().flatten(0, 1), 2).view(half.previews.shape)
        assert (half.previews - pooled).abs().max() <= 1
        torch.testing.assert_close(half.scored, whole.scored)
        torch.testing.assert_close(half.rewards, whole.rewards)


def test_videos():
    """By another video decoder, or by one of images frame by frame, or smaller."""
    case = cases()["WanPipeline, two experts"]
    toy = tiny.Toy(case.build, {name: one for name, one in arguments(case).items() if name != "generator"})
    given = {"reward": level, "num_inference_steps": 4, "num_particles": 2, "num_transitions": 2, "reward_scale": 0.0}
    given["previews"] = True
    plain = toy.steer(**given)
    vae = toy.pipe.vae
    other = type(vae).from_config(vae.config).eval()
    other.load_state_dict(vae.state_dict())
    assert torch.equal(toy.steer(preview_vae=other, **given).previews, plain.previews)
    frame_by_frame = tiny_decoder(vae.config.z_dim, toy.pipe.vae_scale_factor_spatial)
    latent_frames = (plain.previews.shape[2] - 1) // toy.pipe.vae_scale_factor_temporal + 1
    seen = toy.steer(preview_vae=frame_by_frame, **given).previews
    assert seen.shape == (*plain.previews.shape[:2], latent_frames, *plain.previews.shape[3:])
    side = max(plain.previews.shape[-2:])
    assert max(toy.steer(preview_size=side // 2, **given).previews.shape[-2:]) == side // 2


def test_the_best_seen_is_judged_by_its_own_image(sd):
    vae = for_toy(sd)
    options = {"look_ahead": 1, "num_particles": 2, "num_transitions": 4, "reward_scale": 0.0}
    out = sd.steer(list("abcdef"), preview_vae=vae, reward=level, select="best_seen", **options)
    images = torch.from_numpy(out.images).movedim(-1, 1)
    torch.testing.assert_close(level(images, None).double(), out.image_rewards, rtol=0, atol=1e-5)
    assert (out.order < 0).any()


def test_a_decoder_of_another_dtype(sd):
    sd.pipe.to(torch.bfloat16)
    vae = for_toy(sd)
    out = sd.steer(preview_vae=vae, twist=1.0, reward_scale=1.0)
    assert out.rewards.isfinite().all()
    assert vae.dtype == torch.float32


def test_an_offloaded_decoder(sd):
    plain = sd.steer(preview_vae=for_toy(sd), previews=True)
    vae = for_toy(sd)
    cpu_offload(vae, torch.device("cpu"))
    assert torch.equal(sd.steer(preview_vae=vae, previews=True).previews, plain.previews)


@pytest.mark.filterwarnings("ignore:.*reward_scale=:UserWarning")
def test_a_calibration_belongs_to_its_eyes(sd, tmp_path):
    """Also one that was saved."""
    steer = sd.steerer(preview_size=6, reward=level)
    steer.calibrate(**sd.arguments(["a", "b", "c", "d"]))
    steer.calibration = Calibration.load(steer.calibration.save(tmp_path / "calibration.json"))
    steer(**sd.arguments("a cat"))
    steer.preview_size = None
    with pytest.raises(ValueError, match="calibration: expected preview_vae=None and preview_size=6, as it was made"):
        steer(**sd.arguments("a cat"))


def test_what_it_cannot_see(flux):
    wrong = tiny_decoder(flux.pipe.vae.config.latent_channels + 1, flux.pipe.vae_scale_factor)
    with pytest.raises(ValueError, match="^preview_vae: expected a decoder of latents of 4 channels, as FluxPipeline"):
        flux.steer(preview_vae=wrong)
    with pytest.raises(ValueError, match="preview_vae: expected an autoencoder of diffusers, such as AutoencoderTiny"):
        flux.steer(preview_vae=lambda latents: latents)
    for size in (0, 0.5, True):
        with pytest.raises(ValueError, match=f"preview_size: expected .* got {size}"):
            flux.steer(preview_size=size)
    with pytest.raises(ValueError, match='preview_size: expected none with decode="latents"'):
        flux.steer(preview_size=8, decode="latents")
    with pytest.raises(ValueError, match="preview_vae: expected none with decode="):
        flux.steer(preview_vae=for_toy(flux), decode=lambda latents: latents)
    case = cases()["AudioLDM2Pipeline"]
    with pytest.raises(ValueError, match="preview_vae: do not know how AudioLDM2Pipeline decodes by another"):
        FeynmanKacSteerer(case.build(), level, preview_vae=wrong)
    toy = tiny.Toy(case.build, {name: one for name, one in arguments(case).items() if name != "generator"})
    with pytest.raises(ValueError, match="preview_size: expected images or videos, got sound"):
        toy.steer(reward=level, num_particles=2, num_inference_steps=4, preview_size=8)
