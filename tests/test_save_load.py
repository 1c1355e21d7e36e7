"""A result that is saved and loaded is the result."""

import dataclasses
import io
import json
import math
import os

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL.Image import Image
from PIL.Image import fromarray as from_array

import tiny
from glassflows import BeamSearch, BestOfN, Steerer, SteeringResult
from glassflows.host.outputs import rows_of_output

PROMPTS = ["a cat", "NaN"]  # a text that looks like a number is none


@pytest.fixture(scope="module")
def result():
    return tiny.Toy(tiny.flux).steer(PROMPTS, reward_scale=1, ess_threshold=1, previews=True, output_type="pil")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def strict(path):
    """Read a file as JSON, which knows no Infinity and no NaN."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(path.read_text(), parse_constant=refuse)


def picture(result, prompt=0):
    buffer = io.BytesIO()
    result.plot(prompt).savefig(buffer, format="rgba", dpi=50)
    return buffer.getvalue()


def check(result, folder):
    """Save a result and load it; check that it is equal in every field, and return it."""
    loaded = SteeringResult.load(result.save(folder))
    strict(folder / "steering.json")
    assert loaded == result
    assert loaded.ledger.seconds == result.ledger.seconds
    for one in dataclasses.fields(result):
        before, after = (getattr(any_, one.name) for any_ in (result, loaded))
        assert type(before) is type(after), one.name
        if isinstance(before, torch.Tensor):
            assert before.dtype == after.dtype, one.name
            assert before.shape == after.shape, one.name
            assert torch.equal(before.nan_to_num(7), after.nan_to_num(7)), one.name
    return loaded


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("previews", [False, True])
def test_every_form(flux, output_type, previews, tmp_path):
    out = flux.steer(PROMPTS, reward_scale=1, previews=previews, output_type=output_type)
    loaded = check(out, tmp_path)
    if output_type == "pil":
        assert all(np.array_equal(*map(np.asarray, pair)) for pair in zip(loaded.images, out.images, strict=True))
    else:
        assert torch.equal(torch.as_tensor(loaded.images), torch.as_tensor(out.images))
    assert loaded.recipe == out.recipe
    assert loaded._repr_html_() == out._repr_html_()
    assert repr(loaded) == repr(out)


@pytest.mark.slow
def test_figures_are_the_same(result, tmp_path):
    loaded = check(result, tmp_path)
    for prompt in range(2):
        assert picture(loaded, prompt) == picture(result, prompt)
    assert picture(result, 0) != picture(result, 1)


@pytest.mark.parametrize("strategy", [BestOfN(), BeamSearch()])
def test_strategies_without_scorings_or_law(flux, strategy, tmp_path):
    """No scoring leaves empty tensors, a search NaN."""
    steerer = Steerer(flux.pipe, tiny.brightness, strategy, 4, num_transitions=3)
    loaded = check(steerer(**flux.arguments(PROMPTS)), tmp_path)
    assert loaded.log_evidence.isnan().all() == (strategy == BeamSearch())
    assert len(loaded.scored) == (2 if strategy == BeamSearch() else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32])
def test_latents_of_every_precision(result, dtype, tmp_path):
    latents = torch.from_numpy(noise(8, 3, 5)).to(dtype)
    check(dataclasses.replace(result, images=latents, previews=latents[None].float()), tmp_path)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_videos(result, output_type, tmp_path):
    """Also where frames are repeated, which an animated PNG keeps as one that is shown for longer."""
    film = noise(8, 6, 8, 12, 3)
    film[0, 3] = film[0, 2]
    film[1, 1:5] = film[1, 0]
    film[2] = film[2, 0]
    previews = torch.from_numpy((255 * film).astype(np.uint8)).movedim(-1, -3)[None].repeat(2, 1, 1, 1, 1, 1)
    videos = rows_of_output(film, torch.arange(8), output_type)
    out = dataclasses.replace(result, images=videos, previews=previews)
    loaded = check(out, tmp_path)
    assert [len(video) for video in loaded.images] == [6] * 8
    assert picture(loaded) == picture(out)
    if output_type == "pil":
        check(dataclasses.replace(out, images=[video[:1] for video in out.images]), tmp_path)


@pytest.mark.parametrize("mode", ["L", "RGBA", "1"])
def test_images_of_other_kinds(result, mode, tmp_path):
    images = [from_array((255 * noise(6, 7, 3, seed=i)).astype(np.uint8)).convert(mode) for i in range(8)]
    loaded = check(dataclasses.replace(result, images=images), tmp_path)
    assert {image.mode for image in loaded.images} == {mode}


def test_sound(result, tmp_path):
    waveforms = noise(8, 2, 100)
    check(dataclasses.replace(result, images=waveforms, previews=torch.from_numpy(waveforms)[None]), tmp_path)


def test_other_outputs(result, tmp_path):
    others = {
        "audio": torch.from_numpy(noise(8, 2, 50)).bfloat16(),
        "nsfw_content_detected": [False, True] * 4,
        "array": noise(8, 3),
        "words": [("one", math.inf), {"two": [math.nan, None]}],
        "maps": [from_array((255 * noise(4, 5, 3)).astype(np.uint8))] * 2,
        "number": np.float32(0.1),
        "empty": torch.zeros(0, 3),
        "nothing": None,
    }
    loaded = check(dataclasses.replace(result, others=others), tmp_path)
    assert isinstance(loaded.others["words"][0], tuple)
    assert loaded.others["words"][0][1] == math.inf
    assert isinstance(loaded.others["maps"][1], Image)
    assert type(loaded.others["number"]) is np.float32
    objects = dataclasses.replace(result, others={"object": object(), "objects": np.array([None, "a"], object)})
    assert SteeringResult.load(objects.save(tmp_path)).others == {"object": "object", "objects": [None, "a"]}


# ---- what JSON cannot hold -------------------------------------------------------------------------------------------


def test_configs_that_are_not_finite(sd, tmp_path):
    """The scheduler of Sana and PixArt clips log-SNR at −∞, that is, not."""
    sd.pipe.scheduler = DPMSolverMultistepScheduler.from_config(sd.pipe.scheduler.config)
    out = sd.steer(reward_scale=1, output_type="pil")
    assert out.recipe["scheduler"]["native"]["lambda_min_clipped"] == -math.inf
    loaded = check(out, tmp_path)
    assert loaded.recipe["scheduler"]["native"]["lambda_min_clipped"] == -math.inf
    saved = strict(tmp_path / "steering.json")
    assert saved["recipe"]["scheduler"]["native"]["lambda_min_clipped"] == "-Infinity"


def test_arguments_that_are_not_finite(result, tmp_path):
    """Beside texts of the same look, which stay texts."""
    given = {"a": math.inf, "b": [math.nan, "NaN", -math.inf], "c": {"d": "Infinity"}}
    recipe = {**result.recipe, "call": {**result.recipe["call"], **given}}
    loaded = check(dataclasses.replace(result, recipe=recipe), tmp_path)
    assert loaded.recipe["call"]["prompt"] == PROMPTS
    assert loaded.recipe["call"]["a"] == math.inf
    assert math.isnan(loaded.recipe["call"]["b"][0])
    assert loaded.recipe["call"]["b"][1:] == ["NaN", -math.inf]
    assert loaded.recipe["call"]["c"] == {"d": "Infinity"}


def test_what_cannot_be_written_leaves_no_files(result, tmp_path):
    spoilt = dataclasses.replace(result, recipe={**result.recipe, "call": {"prompt": object()}})
    with pytest.raises(TypeError):
        spoilt.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_result_replaces_the_one_before(result, tmp_path):
    """With nothing of it left; what else lies there stays."""
    (tmp_path / "notes.txt").write_text("mine")
    dataclasses.replace(result, images=noise(8, 4, 4, 3)).save(tmp_path)
    assert sorted(os.listdir(tmp_path))[-4:] == ["arrays.npz", "notes.txt", "samples.npy", "steering.json"]
    few = dataclasses.replace(result, images=result.images[:2], order=result.order[:, :1], previews=None, latents=None)
    check(few, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["000.png", "001.png", "notes.txt", "steering.json"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["003.png", "steering.json", "arrays.npz"])
def test_files_of_others_are_not_written_over(result, name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(FileExistsError, match=f"no result put {name}: name another folder"):
        result.save(tmp_path)
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "{}"


def test_a_crafted_record_deletes_nothing_else(result, tmp_path):
    (tmp_path / "precious").write_text("mine")
    folder = result.save(tmp_path / "run")
    record = json.loads((folder / "steering.json").read_text())
    record["files"] += ["../precious", str(tmp_path / "precious"), "precious"]
    (folder / "steering.json").write_text(json.dumps(record))
    (folder / "precious").write_text("mine")
    result.save(folder)
    assert (tmp_path / "precious").read_text() == (folder / "precious").read_text() == "mine"


def test_home_is_expanded(result, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert result.save("~/runs/one") == tmp_path / "runs" / "one"
    assert SteeringResult.load("~/runs/one") == result


def test_there_is_nothing_to_load(result, tmp_path):
    with pytest.raises(FileNotFoundError):
        SteeringResult.load(tmp_path)
    folder = result.save(tmp_path)
    record = json.loads((folder / "steering.json").read_text())
    del record["samples"]
    (folder / "steering.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="load: expected a result of this version"):
        SteeringResult.load(folder)


# ---- equality --------------------------------------------------------------------------------------------------------


def test_equal_results():
    """The same call gives the same result, whatever time it took."""
    one, two, other = (tiny.Toy(tiny.flux).steer(reward_scale=1, seed=seed) for seed in (0, 0, 1))
    assert one == two
    assert one.ledger == two.ledger
    assert dict(one.ledger.seconds) != dict(two.ledger.seconds)
    assert one != other
    assert one != "a result"


def test_any_difference_tells(result):
    assert result == dataclasses.replace(result)
    darker = [from_array(np.asarray(result.images[0]) // 2), *result.images[1:]]
    scored = result.scored.clone()
    scored[0, 0, 0] += 1e-9
    for changed in (
        {"images": darker}, {"images": result.images[:-1]}, {"scored": scored}, {"scored": result.scored.float()},
        {"others": {"a": 1}}, {"previews": None}, {"transitions": (1, 3)}, {"interrupted": True},
        {"images": noise(8, 16, 24, 3)}, {"ledger": dataclasses.replace(result.ledger, decodes=1)},
    ):  # fmt: skip
        assert result != dataclasses.replace(result, **changed), changed.keys()


def test_what_json_can_only_describe_is_loaded_as_its_description(flux, tmp_path):
    out = dataclasses.replace(flux.steer(), others={"generator": tiny.seeded(3)})
    loaded = SteeringResult.load(out.save(tmp_path))
    assert loaded.others == {"generator": {"seed": 3, "device": "cpu"}}
