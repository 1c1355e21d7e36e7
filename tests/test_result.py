"""SteeringResult: what it holds, where its images come from, how it is saved and shown."""

import base64
import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL.Image import open as open_image

import tiny
from glassflows.host.outputs import rows_of_output

PROMPTS = ["a cat", "a dog"]


def test_shapes(flux):
    out = flux.steer(PROMPTS, reward_scale=1, ess_threshold=1)
    assert out.rewards.shape == out.log_weights.shape == out.order.shape == (2, 4)
    assert out.ancestors.shape == (2, 2, 4)
    assert out.ess.shape == (2, 2)
    assert out.log_evidence.shape == (2,)
    assert out.rewards.dtype == out.log_weights.dtype == torch.float64
    assert out.ancestors.dtype == torch.int64
    assert ((out.ancestors >= 0) & (out.ancestors < 4)).all()
    torch.testing.assert_close(out.log_weights.exp().sum(-1), torch.ones(2, dtype=torch.float64))


def test_images_are_in_order(flux):
    """The best first, with the rewards that they have."""
    out = flux.steer(PROMPTS, reward_scale=1, ess_threshold=1)
    best_first = out.rewards.gather(1, out.order)
    assert (best_first.diff() <= 0).all()
    images = torch.from_numpy(out.images).movedim(-1, 1)
    bright = tiny.brightness(images, [""] * 8).double().view(2, 4)
    torch.testing.assert_close(bright, best_first, rtol=0, atol=1e-3)
    assert torch.equal(out.image_rewards, best_first.flatten())


def test_lineages(flux):
    """From parent to child, down to the best or to the slot that was asked for."""
    out = flux.steer(PROMPTS, reward_scale=1, ess_threshold=1)
    for prompt in range(2):
        lineages = [out.lineage(prompt), *(out.lineage(prompt, slot) for slot in range(4))]
        assert [lineage[-1] for lineage in lineages] == [int(out.order[prompt, 0]), 0, 1, 2, 3]
        for lineage in lineages:
            for row, (parent, slot) in enumerate(pairwise(lineage)):
                assert int(out.ancestors[row, prompt, slot]) == parent


def test_previews_are_what_the_reward_saw(flux, sd):
    seen = []

    def reward(images, prompts):
        seen.append(images.clone())
        return tiny.brightness(images, prompts)

    out = flux.steer(reward=reward, previews=True)
    torch.testing.assert_close(out.previews / 255, torch.stack(seen[:-1]), rtol=0, atol=0.51 / 255)
    bright = torch.full((4, 3, 16, 24), 1.004)
    out = flux.steer(reward=lambda images, prompts: [0.0] * 4, decode=lambda z: bright, previews=True)
    assert (out.previews == 255).all()
    out = sd.steer(reward=lambda z, p: z.mean((1, 2, 3)), decode="latents", previews=True)
    assert out.previews.min() < 0
    assert flux.steer(PROMPTS, previews=True).previews.shape == (2, 8, 3, 16, 24)
    assert flux.steer().previews is None


# ---- what is written -------------------------------------------------------------------------------------------------


def test_a_result_is_saved_with_what_reproduces_it(flux, tmp_path):
    out = flux.steer(reward_scale=2, output_type="pil", ess_threshold=1)
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
    assert "Infinity" not in (folder / "steering.json").read_text()


def test_latents_are_saved_as_arrays(flux, tmp_path):
    latents = flux.steer(output_type="latent")
    assert latents._repr_html_().startswith("<pre>")
    assert np.load(latents.save(tmp_path) / "samples.npy").shape == (4, 24, 16)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_videos_are_saved_and_shown_as_animations(flux, output_type, tmp_path):
    film = np.random.default_rng(0).random((2, 5, 8, 12, 3), dtype=np.float32)
    out = flux.steer(num_particles=2)
    out = dataclasses.replace(out, images=rows_of_output(film, torch.tensor([0, 1]), output_type))
    folder = out.save(tmp_path)
    with open_image(folder / "001.png") as saved:
        assert saved.n_frames == 5
        saved.seek(3)
        np.testing.assert_allclose(np.asarray(saved.convert("RGB")) / 255, film[1, 3], atol=0.51 / 255)
    assert out._repr_html_().count("<img") == 2


def test_notebooks_show_prompts_and_images(flux):
    shown = flux.steer(["a cat", "a <dog>"], num_particles=2, output_type="pil")._repr_html_()
    assert shown.count("<img") == 4
    assert "<p>a &lt;dog&gt;</p>" in shown


# ---- the recipe ------------------------------------------------------------------------------------------------------


def test_the_recipe_holds_what_was_asked_for(flux):
    options = {"potential": "max", "resampling": "ssp", "reward_scale": np.float32(3.5)}
    given = {"joint_attention_kwargs": {"scale": 1}, "sigmas": np.linspace(1, 0.2, 6)}
    out = flux.steer(num_images_per_prompt=2, **options, **given)
    recipe = json.loads(json.dumps(out.recipe))
    assert recipe["steerer"] | {"potential": "max", "resampling": "ssp", "reward_scale": 3.5} == recipe["steerer"]
    assert recipe["call"]["num_images_per_prompt"] == 2
    assert recipe["call"]["joint_attention_kwargs"] == {"scale": 1}
    np.testing.assert_allclose(recipe["call"]["sigmas"], given["sigmas"])
    fresh = flux.steer(PROMPTS, generator=[tiny.seeded(1), tiny.seeded(2)], **options).recipe
    assert fresh["call"]["generator"] == [{"seed": 1, "device": "cpu"}, {"seed": 2, "device": "cpu"}]
    flux.steerer(**recipe["steerer"])


@pytest.mark.parametrize("given", ["a generator drawn from", "none"])
def test_a_saved_state_reproduces_the_call(flux, given, tmp_path):
    """Whatever was drawn before from the generator, or from torch's own where the call names none."""
    generator = torch.default_generator.manual_seed(3) if given == "none" else tiny.seeded()
    torch.randn(7, generator=generator)
    arguments = flux.arguments(generator=generator)
    if given == "none":
        del arguments["generator"]
    out = flux.steerer()(**arguments)
    recipe = json.loads((out.save(tmp_path) / "steering.json").read_text())["recipe"]
    written = recipe["call"]["global_generator" if given == "none" else "generator"]
    state = torch.frombuffer(bytearray(base64.b64decode(written["state"])), dtype=torch.uint8)
    again = flux.steer(generator=tiny.seeded().set_state(state))
    assert np.array_equal(again.images, out.images)
