"""The embedded model: its language, its judge, and what is trained."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxPipeline

import tiny
from glassflows import GLASSScheduler
from scenes import CALL, CLIP, HERE, PIPELINE, load_pipeline, load_reward
from scenes.draw import BACKGROUND, draw
from scenes.grammar import HELD_OUT, TRAIN, hard_negatives, held_out_prompts, parse, training_scene
from scenes.methods import methods
from scenes.verifier import find_objects, is_correct, score, verdicts


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


@pytest.fixture(scope="module")
def reward():
    return load_reward()


def drawn(number, seed=0, split=training_scene):
    rng = np.random.default_rng(seed)
    scenes = [split(rng) for _ in range(number)]
    return np.stack([draw(scene, rng) for scene in scenes]), scenes


# ---- language and judge ----------------------------------------------------------------------------------------------


def test_held_out_combinations_are_never_trained():
    train, held_out = ({frozenset(Counter(s.objects).items()) for g in split for s in g} for split in (TRAIN, HELD_OUT))
    assert held_out
    assert not train & held_out
    prompts = held_out_prompts(64)
    assert len(set(prompts)) == 64
    assert all(frozenset(Counter(parse(prompt).objects).items()) in held_out for prompt in prompts)


def test_prompts_say_their_scene():
    for group in TRAIN + HELD_OUT:
        for scene in group:
            assert parse(scene.prompt) == scene


@pytest.mark.slow
def test_verifier_reads_real_scenes():
    images, scenes = drawn(1000)
    assert verdicts(images, [scene.prompt for scene in scenes]).mean() >= 0.99


def test_verifier_rejects_near_misses():
    rng = np.random.default_rng(1)
    images, scenes = drawn(300, seed=1)
    wrong = []
    for image, scene in zip(images, scenes, strict=True):
        near = hard_negatives(scene, rng, 1)[0]
        if Counter(near.objects) != Counter(scene.objects):
            wrong.append(is_correct(image, near.prompt))
    assert len(wrong) > 150
    assert np.mean(wrong) < 0.01


def test_verifier_knows_left_from_right_and_above_from_below():
    scene = parse("a red circle left of a blue square")
    image = draw(scene, np.random.default_rng(0))
    left, right = sorted(find_objects(image), key=lambda found: found.x)
    assert (left.colour, left.shape, right.colour, right.shape) == ("red", "circle", "blue", "square")
    truths = [
        is_correct(image, f"a red circle {relation} a blue square") for relation in ("left of", "right of", "above")
    ]
    assert truths == [True, False, False]
    assert is_correct(image.transpose(0, 2, 1), "a red circle above a blue square")


def test_scores_rank_what_the_verdict_cannot():
    """An exact scene first, then the same turned about, then one object missing, then nothing."""
    rng = np.random.default_rng(2)
    wanted, turned = "a red circle left of a blue square", "a blue square left of a red circle"
    exact, about, lone = (draw(parse(prompt), rng) for prompt in (wanted, turned, "a red circle"))
    empty = np.broadcast_to(np.reshape(BACKGROUND, (3, 1, 1)), exact.shape)
    found = [score(image, wanted) for image in (exact, about, lone, empty)]
    assert found[0] > 1.5
    assert found[2:] == [0.5, 0.0]
    assert found[1] < found[2]
    assert score(exact, turned) == pytest.approx(found[1], abs=0.3)


def test_verifier_finds_nothing_on_an_empty_image():
    assert find_objects(np.full((3, 32, 32), 0.92)) == []


# ---- the trained parts -----------------------------------------------------------------------------------------------


def test_weights_are_small_and_plain():
    files = [path for folder in (PIPELINE, CLIP) for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 24e6
    assert (HERE / "training.log").read_text().startswith("seed 0")


@tiny.TRANSFORMERS_5
def test_loads_as_an_ordinary_pipeline(monkeypatch):
    monkeypatch.chdir(Path(HERE).parents[1])
    pipe = DiffusionPipeline.from_pretrained("examples/scenes/pipeline")
    assert type(pipe) is FluxPipeline


@pytest.mark.slow
def test_autoencoder_keeps_what_the_judge_reads():
    vae = AutoencoderKL.from_pretrained(PIPELINE / "vae")
    images, scenes = drawn(300, seed=2)
    with torch.no_grad():
        latents = vae.encode(torch.from_numpy(images) * 2 - 1).latent_dist.mode()
        decoded = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).numpy()
    assert verdicts(decoded, [scene.prompt for scene in scenes]).mean() >= 0.97
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert scaled.std().item() == pytest.approx(1, abs=0.1)


@tiny.TRANSFORMERS_5
def test_one_transition_is_the_native_sampler(pipe):
    native, prompts = pipe.scheduler, held_out_prompts(4)
    call = CALL | {"num_inference_steps": 12, "output_type": "np"}
    expected = pipe(prompts, generator=torch.Generator().manual_seed(0), **call).images
    pipe.scheduler = GLASSScheduler.from_config(native.config, num_transitions=1, solver_order=1)
    try:
        got = pipe(prompts, generator=torch.Generator().manual_seed(0), **call).images
    finally:
        pipe.scheduler = native
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.slow
@tiny.TRANSFORMERS_5
def test_steering_beats_plain_sampling(pipe, reward):
    """16 held-out prompts, one seed: the whole population scores higher, and more pictures are right."""
    prompts = held_out_prompts(16)

    def run(name):
        return methods(8)[name](pipe, reward, prompts, 20, torch.Generator().manual_seed(0), CALL)

    plain, steered = run("GLASS, best of 8"), run("FK, GLASS")
    assert steered.population.mean() > plain.population.mean() + 1
    single = run("ODE, one image")
    assert steered.rewards.mean() > single.rewards.mean() + 1

    assert verdicts(steered.images, prompts).sum() > verdicts(single.images, prompts).sum()


@pytest.mark.slow
@tiny.TRANSFORMERS_5
def test_plain_samples_leave_room_to_steer(pipe, reward):
    """The README's 52 ± 6 % of 64 held-out prompts right, in one image each."""
    prompts = held_out_prompts(64)
    run = methods(8)["ODE, one image"](pipe, reward, prompts, 20, torch.Generator().manual_seed(0), CALL)
    assert 0.4 < verdicts(run.images, prompts).mean() < 0.8
