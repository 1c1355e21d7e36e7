"""The embedded model: its language, its judge, and what is trained."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxPipeline

import tiny
from glassflows import FeynmanKacSteerer, GLASSScheduler
from scenes import CALL, CLIP, HERE, PIPELINE, load_pipeline, load_reward
from scenes.draw import BACKGROUND, draw, holds, paint, place
from scenes.grammar import Object, Scene, hard_prompts, held_out_prompts, near_miss, parse, training_scene
from scenes.methods import SHOWN, Spending, plain
from scenes.verifier import RuleReward, find_objects, is_correct, other_verdicts, read, verdicts


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
    rng = np.random.default_rng(0)
    seen = set()
    for scene in (training_scene(rng) for _ in range(3000)):
        seen |= {frozenset(pair) for pair in combinations(scene.kinds, 2)} if not scene.is_count else {scene.kinds}
    for prompts in (held_out_prompts(64), hard_prompts(64)):
        assert len(set(prompts)) == 64
        for scene in map(parse, prompts):
            pairs = {frozenset(pair) for pair in combinations(scene.kinds, 2)}
            assert ({scene.kinds} if scene.is_count else pairs) - seen


def test_old_prompts_are_in_the_language():
    for prompt in (
        "a red circle",
        "two green triangles",
        "a blue square above a red circle",
        "a red circle and a blue square",
    ):
        assert parse(prompt).prompt == prompt
    assert held_out_prompts(6)[:2] == ["a purple triangle right of a green triangle", "two yellow triangles"]


def test_prompts_say_their_scene():
    rng = np.random.default_rng(0)
    scenes = [training_scene(rng) for _ in range(3000)]
    assert all(parse(scene.prompt) == scene for scene in scenes)
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4}
    assert all(parse(prompt).prompt == prompt for prompt in hard_prompts(200))
    hard = parse("a small red circle left of a big blue square and above a green triangle")
    assert hard == Scene(
        (Object("red", "circle", "small"), Object("blue", "square", "big"), Object("green", "triangle")),
        ("left of", "above"),
    )
    assert hard.related == [(0, "left of", 1), (0, "above", 2)]
    assert parse("a red circle left of a blue square and a green triangle").relations == ("left of", "left of")
    pairs = parse("a red circle left of a blue square and a green triangle above a red square")
    assert pairs.related == [(0, "left of", 1), (2, "above", 3)]


@pytest.mark.parametrize(
    "sentence",
    [
        "a red dog",
        "a red circle left of a red circle",
        "four big red circles",
        "a red circle and a blue square and a green triangle",
        "a big red circle left of a big blue square and a green triangle",
        "a red circle and a blue square and a green triangle above a red square",
        "a red circle left of a blue square and a green triangle above a red circle",
        "a small red circle left of a blue square and a green triangle above a red square",
        "two red circles left of a blue square",
        "",
    ],
)
def test_other_sentences_are_not(sentence):
    with pytest.raises(KeyError):
        parse(sentence)


@pytest.mark.slow
def test_verifier_reads_real_scenes():
    images, scenes = drawn(1000)
    assert verdicts(images, [scene.prompt for scene in scenes]).mean() >= 0.99


@pytest.mark.slow
def test_verifier_rejects_near_misses():
    rng = np.random.default_rng(1)
    wrong = []
    for scene in (training_scene(rng) for _ in range(400)):
        near = near_miss(scene, rng)
        where = place(near, rng)
        if not holds(scene, near, *where):
            wrong.append(is_correct(paint(near, *where), scene.prompt))
    assert len(wrong) > 350
    assert np.mean(wrong) < 0.03  # centres between 45° and the 52° that are clearly in a relation


def test_verifier_knows_left_from_right_and_above_from_below():
    scene = parse("a red circle left of a blue square")
    image = draw(scene, np.random.default_rng(0))
    left, right = sorted(find_objects(image), key=lambda found: found.x)
    assert (left.kind, right.kind) == (("red", "circle"), ("blue", "square"))
    truths = [
        is_correct(image, f"a red circle {relation} a blue square") for relation in ("left of", "right of", "above")
    ]
    assert truths == [True, False, False]
    assert is_correct(image.transpose(0, 2, 1), "a red circle above a blue square")


@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
@pytest.mark.parametrize(("size", "radius"), [("small", 3.5), ("big", 5.2)])
def test_verifier_reads_where_an_object_is_and_how_big(shape, size, radius):
    scene = Scene((Object("red", shape),))
    (found,) = find_objects(paint(scene, np.array([[11.3, 17.8]]), np.array([radius])))
    assert found.kind == ("red", shape)
    assert found.size == size
    assert found.radius == pytest.approx(radius, abs=0.1)
    assert found.x == pytest.approx(11.3, abs=0.1)
    assert found.y == pytest.approx(17.8 + (radius / 3 if shape == "triangle" else 0), abs=0.15)


def test_criteria_rank_what_the_verdict_cannot():
    """An exact scene first, then the same turned about, then one object missing, then nothing."""
    rng = np.random.default_rng(2)
    wanted, turned = "a red circle left of a blue square", "a blue square left of a red circle"
    exact, about, lone = (draw(parse(prompt), rng) for prompt in (wanted, turned, "a red circle"))
    empty = np.broadcast_to(np.reshape(BACKGROUND, (3, 1, 1)), exact.shape)
    found = [np.mean(read(image, parse(wanted)).criteria) for image in (exact, about, lone, empty)]
    assert found[0] > 0.9
    assert found[0] > found[1] > found[2] > found[3]


def test_halves_of_the_criteria_are_judged_apart():
    """Of two objects and a relation the reward reads the first and the relation, its judge the second and the size."""
    prompt = "a small red circle left of a blue square"
    scene, other = parse(prompt), parse("a big red circle left of a blue square")
    images = np.stack([draw(one, np.random.default_rng(3)) for one in (scene, other)])
    assert read(images[1], scene).sizes == (0.0,)
    first, second = RuleReward()(torch.from_numpy(images), [prompt] * 2)
    assert first == pytest.approx(second, abs=3)
    assert other_verdicts(images, [prompt] * 2).tolist() == [True, False]


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
    """10 hard prompts, one seed: the whole population scores higher, and more pictures are right."""
    prompts = hard_prompts(10)
    plain, steered = (
        method(pipe, reward, prompts, spending, 0)
        for method, spending in (SHOWN["best of 26"], SHOWN["FK, GLASS, twisted"])
    )
    assert 150 < plain.calls <= 160
    assert 150 < steered.calls <= 160
    assert steered.rewards.mean() > plain.rewards.mean() + 5
    assert steered.rewards[:, 0].mean() > plain.rewards[:, 0].mean()
    method, spending = SHOWN["one image"]
    single = method(pipe, reward, prompts, spending, 0)
    assert verdicts(steered.images[:, 0], prompts).sum() > verdicts(single.images[:, 0], prompts).sum()


@pytest.mark.slow
@tiny.TRANSFORMERS_5
@pytest.mark.parametrize(("kind", "least", "most"), [(held_out_prompts, 0.5, 0.9), (hard_prompts, 0.05, 0.25)])
def test_plain_samples_leave_room_to_steer(pipe, reward, kind, least, most):
    """One image of each of 64 prompts."""
    prompts = kind(64)
    images = plain()(pipe, reward, prompts, Spending(20, 20), 0).images[:, 0]
    assert least < verdicts(images, prompts).mean() < most


@tiny.TRANSFORMERS_5
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"twist": 1.0, "num_transitions": 4}, {"look_ahead": 2}], ids=str)
def test_steering_on_a_gpu_is_steering_on_a_cpu(monkeypatch, options):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    rewards = []
    for device in ("cpu", "cuda"):
        pipe, reward = load_pipeline().to(device), load_reward()
        call = CALL | {"num_inference_steps": 10, "generator": torch.Generator().manual_seed(0)}
        rewards.append(FeynmanKacSteerer(pipe, reward, 8, **options)(hard_prompts(3, seed=3), **call).rewards[:, 0])
    np.testing.assert_allclose(*rewards, atol=0.1)
