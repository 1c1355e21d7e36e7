"""Batches: the arguments of a call laid out for K particles of each prompt, and whose rows a pipeline runs."""

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from glassflows import GLASSScheduler
from glassflows.host.batch import lay_out
from zoo import transformers_2d
from zoo.survey import cases

PROMPTS = ["a cat", "a dog"]


def indifferent(samples, prompts):
    return torch.zeros(len(samples))


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "guidance"), [(tiny.sd, {"guidance_scale": 4.0}), (tiny.flux, {"true_cfg_scale": 4.0})]
)
def test_negative_prompts_and_guidance(make, guidance):
    """A single prompt stays a string, as the pipeline was given it: its negative prompt may be one too."""
    out = tiny.Toy(make).steer(num_particles=3, negative_prompt="a dog", **guidance)
    assert out.images.shape == (3, 16, 24, 3)


def test_prompts_in_a_tuple_and_counts_of_none(flux):
    assert len(flux.steer(("a cat", "a dog"), num_particles=2, num_images_per_prompt=None).images) == 4


def test_each_class_has_its_own_particles():
    """Two classes, one of which is always worth the same: it is never resampled."""

    def reward(images, prompts):
        assert prompts == [None] * 6
        return torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 2.0])

    toy = tiny.Toy(transformers_2d.dit, {"class_labels": [7, 2]})
    out = toy.steer(reward=reward, num_particles=3, reward_scale=1e4)
    assert out.images.shape == (6, 16, 16, 3)
    assert out.ancestors[:, 0].tolist() == [[0, 1, 2]] * 2
    assert out.ancestors[:, 1].tolist() == [[2, 2, 2]] * 2


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pil", "array", "list of arrays", "tensor"])
def test_each_prompt_keeps_its_own_image(img2img, kind, monkeypatch):
    """Two prompts with an image each: the particles of a prompt all start from its image."""
    vae, encoded, add_noise = img2img.pipe.vae, [], GLASSScheduler.add_noise

    def noting(self, original_samples, noise, timesteps):
        encoded.append(original_samples)
        return add_noise(self, original_samples, noise, timesteps)

    monkeypatch.setattr(GLASSScheduler, "add_noise", noting)
    images = torch.stack([torch.rand(3, 16, 24, generator=tiny.seeded(seed)) ** seed for seed in (1, 9)])
    arrays = images.movedim(1, -1).numpy()
    given = {
        "pil": [Image.fromarray((255 * array).astype(np.uint8)) for array in arrays],
        "array": arrays, "list of arrays": [*arrays], "tensor": images,
    }  # fmt: skip
    img2img.steer(PROMPTS, image=given[kind], strength=0.5, num_particles=3, num_transitions=2)
    with torch.no_grad():
        own = vae.encode(2 * images - 1).latent_dist.mode() - (vae.config.shift_factor or 0.0)
    rows = encoded[0] / vae.config.scaling_factor
    distances = (rows[:, None] - own).square().mean((2, 3, 4))
    assert distances.argmin(1).tolist() == [0, 0, 0, 1, 1, 1]


def test_as_many_images_as_prompts_or_one():
    toy, image = tiny.Toy(tiny.sd_img2img), torch.rand(4, 3, 16, 24, generator=tiny.seeded())
    with pytest.raises(ValueError, match="^image: expected one, or one for each prompt, 2, got 4$"):
        toy.steer(PROMPTS, image=image, num_particles=2)


def test_a_list_of_images_is_one_for_each_control_network(sd):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
    from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

    network = ControlNetModel.from_unet(sd.pipe.unet, conditioning_embedding_out_channels=(8, 8)).eval()
    parts = {**sd.pipe.components, "controlnet": MultiControlNetModel([network, network])}
    sd.pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    sd.pipe.set_progress_bar_config(disable=True)
    pictures = [Image.fromarray(np.full((16, 24, 3), value, np.uint8)) for value in (0, 255)]
    assert sd.steer(PROMPTS, num_particles=3, image=pictures).rewards.shape == (2, 3)


@pytest.mark.slow
@tiny.DIFFUSERS_42
@pytest.mark.parametrize("name", ["StableVideoDiffusionPipeline", "StableDiffusionImageVariationPipeline"])
def test_images_without_prompts_are_groups(name):
    """Another second image changes the second group, and that alone."""
    case = cases()[name]
    call = case.call()
    call.pop("decode_chunk_size", None)  # diffusers' chunks of frames may hold those of two videos
    image, outputs = call.pop("image"), []
    is_tensor = isinstance(image, torch.Tensor)
    values = (0.0, 1.0, 0.5)
    one, *others = (
        [torch.full_like(image, value) for value in values]
        if is_tensor
        else [Image.new("RGB", image.size, (int(255 * value),) * 3) for value in values]
    )
    for other in others:
        both = torch.cat([one, other]) if is_tensor else [one, other]
        toy = tiny.Toy(case.build, call | {"image": both, "output_type": "np", "num_inference_steps": 4})
        out = toy.steer(reward=indifferent, num_particles=3, num_transitions=2)
        assert out.rewards.shape == (2, 3)
        outputs.append(np.asarray(out.images))
    np.testing.assert_allclose(outputs[0][:3], outputs[1][:3], atol=1e-5)
    assert np.abs(outputs[0][3:] - outputs[1][3:]).max() > 1e-4


@tiny.DIFFUSERS_42
@pytest.mark.parametrize(("prompts", "references"), [(1, 1), (1, 2), (2, 2), (2, 1)])
def test_reference_images_are_for_all_prompts(prompts, references):
    """FLUX.2 sees as many tokens of them as without steering."""
    case, seen = cases()["Flux2Pipeline"], []
    given = {
        "image": [Image.new("RGB", (64, 64), colour) for colour in ("black", "white")][:references],
        "prompt_embeds": torch.randn(prompts, 8, 16, generator=tiny.seeded()),
    }
    toy = tiny.Toy(case.build, case.call() | given | {"num_inference_steps": 2})
    toy.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].shape), with_kwargs=True
    )
    toy.run()
    toy.steer(reward=indifferent, num_particles=3, num_transitions=2)
    assert seen[0][1:] == seen[-1][1:]
    assert (len(seen[0]), seen[-1][0]) == (3, 3 * prompts)


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_mirrored_rows_move_with_their_particles(monkeypatch):
    """DiT doubles its batch for guidance: two particles are four rows, and no four particles."""
    seen = tiny.predictions(monkeypatch)
    toy = tiny.Toy(transformers_2d.dit, {"class_labels": [7], "guidance_scale": 4.0})
    out = toy.steer(num_inference_steps=4, **tiny.SECOND_TAKES_ALL)
    assert [len(rows) for _, rows in seen] == [4] * 4
    resampled = seen[2][1]
    assert all(torch.equal(row, resampled[0]) for row in resampled)
    assert out.images.shape == (2, 16, 16, 3)
    assert not np.array_equal(out.images[0], out.images[1])


@pytest.mark.parametrize("make", [tiny.sd_img2img, tiny.flux_img2img])
@pytest.mark.parametrize("listed", [False, True])
def test_one_prompt_has_one_image(make, listed):
    """Its particles would be dealt out between two, whichever way the pipeline repeats it."""
    toy, images = tiny.Toy(make), torch.rand(2, 3, 16, 24, generator=tiny.seeded())
    for image in (images, list(images)):
        with pytest.raises(ValueError, match="image: expected one, or one for each prompt, 1, got 2"):
            toy.steer(image=image, **({"generator": [tiny.seeded()]} if listed else {}))


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_latents_are_one_for_each_particle(flux, rows):
    latents = torch.randn(rows, 24, 16, generator=tiny.seeded())
    with pytest.raises(ValueError, match=rf"latents: expected prompts × num_particles = 4 rows.*got {rows}:"):
        flux.steer(latents=latents)


@tiny.DIFFUSERS_42
def test_latents_of_sound_are_one_for_each_particle():
    """LTX-2 would share one row's noise among all particles."""
    case = cases()["LTX2Pipeline"]
    given = {**case.call(), "audio_latents": torch.zeros(1, 2, 4, 8)}
    with pytest.raises(ValueError, match=r"^audio_latents: expected prompts × num_particles = 3 rows.*got 1:"):
        lay_out(case.build(), given, 3)


def test_a_users_subclass_is_laid_out_as_the_class_it_derives_from():
    class Flux2KleinPipeline:
        def __call__(self, image=None, prompt=None, num_images_per_prompt=1):
            raise AssertionError("never called")

    class Mine(Flux2KleinPipeline):
        pass

    pictures = [Image.fromarray(np.full((16, 24, 3), value, np.uint8)) for value in (0, 255)]
    given = {"prompt": ["a cat", "a dog"], "image": pictures}
    for cls in (Flux2KleinPipeline, Mine):  # references are for all prompts
        assert lay_out(cls(), given, 3).arguments["image"] is pictures
