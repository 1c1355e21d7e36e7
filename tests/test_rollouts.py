"""Samples as rows, and a folder of them: what is kept, restarts, crashes, what trainers read."""

import dataclasses
import json
import math
import threading

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from glassflows import Rollouts, SteeringResult
from test_exact import steer

PROMPTS = ["a cat", "a dog"]


@pytest.fixture(scope="module")
def result():
    return tiny.Toy(tiny.flux).steer(PROMPTS, reward_scale=1, ess_threshold=1, output_type="pil")


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_rows(result):
    samples = result.samples()
    assert len(samples) == 8
    assert samples.prompts == ("a cat",) * 4 + ("a dog",) * 4
    assert samples.groups.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(samples.rewards, result.image_rewards)
    assert samples.images.shape == (8, 3, 16, 24)
    for picture, image in zip(result.images, samples.images, strict=True):
        assert np.array_equal(np.asarray(picture), image.movedim(0, -1).numpy())
    for i, slot in enumerate(result.order.flatten().tolist()):
        prompt = i // 4
        assert samples.lineages[i].tolist() == result.lineage(prompt, slot)
        assert samples.log_weights[i] == result.log_weights[prompt, slot]
    torch.testing.assert_close(samples.log_weights.view(2, 4).exp().sum(1), torch.ones(2).double())


@pytest.mark.parametrize("make", [tiny.flux, tiny.sd])
def test_latents_are_what_images_are_decoded_from(make):
    toy = tiny.Toy(make)
    out = toy.steer(PROMPTS, reward_scale=1, output_type="np")
    latents, vae = out.samples().latents, toy.pipe.vae
    if make is tiny.flux:
        latents = toy.pipe._unpack_latents(latents, 16, 24, toy.pipe.vae_scale_factor)
    with torch.no_grad():
        images = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample
    expected = torch.from_numpy(out.images).movedim(-1, 1)
    torch.testing.assert_close((images / 2 + 0.5).clamp(0, 1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [tiny.flux_inpaint, tiny.sd_inpaint])
def test_latents_of_inpainting_hold_what_is_kept(make):
    out = tiny.Toy(make).steer(reward_scale=1, output_type="latent")
    torch.testing.assert_close(out.latents, out.images, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_pictures_of_every_form_are_bytes(flux, result, output_type):
    out = flux.steer(PROMPTS, reward_scale=1, ess_threshold=1, output_type=output_type)
    assert torch.equal(out.samples().images, result.samples().images)


def test_latent_output_stays_as_it_is(flux):
    out = flux.steer(reward_scale=1, output_type="latent", num_images_per_prompt=2)
    samples = out.samples()
    assert torch.equal(samples.images, samples.latents)
    assert torch.equal(samples.latents, out.images)


def test_videos_and_sound(result):
    noise = np.random.default_rng(0).random((8, 5, 4, 6, 3), dtype=np.float32)
    videos = dataclasses.replace(result, images=noise).samples()
    assert videos.images.shape == (8, 5, 3, 4, 6)
    assert np.array_equal(videos.images.movedim(2, -1).numpy(), (255 * noise).round().astype(np.uint8))
    films = videos.as_dict()["image"]
    assert [len(film) for film in films] == [5] * 8
    assert np.array_equal(np.asarray(films[3][2]), videos.images[3, 2].movedim(0, -1).numpy())
    sound = noise[..., 0].reshape(8, 2, 60)
    assert np.array_equal(dataclasses.replace(result, images=sound).samples().images.numpy(), sound)


def test_samples_drawn_by_weight_weigh_the_same(flux):
    out = flux.steer(PROMPTS, reward_scale=1, select="sample", num_images_per_prompt=3)
    assert torch.equal(out.samples().log_weights, torch.full((6,), -math.log(3), dtype=torch.float64))


def test_best_ends_of_excursions():
    """They have latents of their own, no slot and no weight."""
    out = steer(0, 4, prompt=["x"] * 6, steps=6, num_transitions=3, look_ahead=1, select="best_seen", ess_threshold=0.0)
    ends = out.order[:, 0] < 0
    assert ends.any()
    samples = out.samples()
    torch.testing.assert_close(samples.latents.flatten().double(), samples.rewards)
    assert (samples.lineages[ends] == -1).all()
    assert torch.equal(samples.log_weights.isnan(), ends)


def test_pairs(flux):
    out = flux.steer(PROMPTS, reward_scale=1)
    assert out.samples().pairs() == [(0, 3), (4, 7)]
    assert out.samples().pairs(margin=1e9) == []
    lowest = flux.steer(PROMPTS, reward_scale=-1).samples()
    assert [lowest.rewards[i] < lowest.rewards[j] for i, j in lowest.pairs()] == [True, True]


def test_of_an_earlier_version(result, tmp_path):
    folder = result.save(tmp_path)
    record = json.loads((folder / "steering.json").read_text())
    del record["latents"], record["trajectories"]
    (folder / "steering.json").write_text(json.dumps(record))
    loaded = SteeringResult.load(folder)
    with pytest.raises(ValueError, match="expected a result with latents.*draw it again"):
        loaded.samples()


def test_columns(result):
    table = datasets.Dataset.from_dict(result.samples().as_dict())
    assert table.column_names == ["prompt", "image", "latents", "reward", "log_weight", "lineage", "group"]
    assert table[5]["prompt"] == "a dog"
    assert np.array_equal(np.asarray(table[5]["image"]), np.asarray(result.images[5]))
    assert np.allclose(table[5]["latents"], result.latents[5])


# ---- a folder of them ------------------------------------------------------------------------------------------------


def test_a_folder_holds_what_was_added(flux, result, tmp_path):
    rollouts = Rollouts(tmp_path / "new")
    assert len(rollouts) == 0
    assert rollouts.add(result)
    assert rollouts.add(flux.steer("a bird", seed=1, num_images_per_prompt=2), key="bird")
    assert len(rollouts) == 10
    assert "bird" in rollouts
    samples = result.samples()
    for i, row in enumerate([*rollouts][:8]):
        assert torch.equal(row["latents"], samples.latents[i])
        assert torch.equal(row["image"], samples.images[i])
        assert row["prompt"] == samples.prompts[i]
        assert row["lineage"] == samples.lineages[i].tolist()
        assert (row["reward"], row["log_weight"]) == (float(samples.rewards[i]), float(samples.log_weights[i]))
    assert rollouts[-1]["prompt"] == "a bird"
    for one, other in zip(rollouts, Rollouts(tmp_path / "new"), strict=True):
        same(one, other)


def test_nothing_is_there_twice(flux, result, tmp_path):
    rollouts = Rollouts(tmp_path)
    assert rollouts.add(result)
    assert not rollouts.add(result)
    again = Rollouts(tmp_path)
    assert not again.add(flux.steer(PROMPTS, reward_scale=1, ess_threshold=1, output_type="np"))  # the same draws
    assert again.add(flux.steer(PROMPTS, reward_scale=1, ess_threshold=1, seed=1))
    assert not again.add(result, key=again[-1]["key"])
    assert len(Rollouts(tmp_path)) == 16


@pytest.mark.parametrize("lost", [1, 30, 1200])
def test_a_call_that_was_cut_off_is_not_there(flux, result, lost, tmp_path):
    """What follows it is: a new call, and the same once more."""
    rollouts, other = Rollouts(tmp_path), flux.steer("a bird", seed=1)
    rollouts.add(other, key="bird")
    rollouts.add(result, key="pets")
    lines = tmp_path / "rollouts.jsonl"
    lines.write_bytes(lines.read_bytes()[:-lost])
    again = Rollouts(tmp_path)
    complete = lost == 1  # but for the newline
    assert len(again) == (12 if complete else 4)
    assert ("pets" in again) == complete
    assert again.add(flux.steer("a fish", seed=2), key="fish")
    assert again.add(result, key="pets") != complete
    third = Rollouts(tmp_path)
    assert len(third) == 16
    assert {row["key"] for row in third} == {"bird", "pets", "fish"}
    assert torch.equal(third[0]["latents"], other.samples().latents[0])


def test_tensors_that_were_cut_off_leave_no_trace(result, tmp_path, monkeypatch):
    def failing(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("glassflows.steering.rollouts.save_file", failing)
    rollouts = Rollouts(tmp_path)
    with pytest.raises(OSError, match="no space left"):
        rollouts.add(result, key="pets")
    monkeypatch.undo()
    assert "pets" not in rollouts
    assert rollouts.add(result, key="pets")
    assert torch.equal(Rollouts(tmp_path)[7]["latents"], result.latents[7])
    assert len([*tmp_path.iterdir()]) == 2


def test_writers_side_by_side(result, tmp_path):
    """Each has read the folder before the others wrote."""
    writers = [Rollouts(tmp_path) for _ in range(4)]
    threads = [
        threading.Thread(target=lambda one=one, i=i: [one.add(result, key=f"{i}/{j}") for j in range(5)])
        for i, one in enumerate(writers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = Rollouts(tmp_path)
    assert len(together) == 4 * 5 * 8
    assert len({row["key"] for row in together}) == 20


def test_pairs_of_a_folder(flux, tmp_path):
    rollouts = Rollouts(tmp_path)
    for seed in (0, 1):
        rollouts.add(flux.steer(PROMPTS, reward_scale=1, seed=seed))
    pairs = rollouts.pairs()
    assert pairs == [(0, 3), (4, 7), (8, 11), (12, 15)]
    assert all(rollouts[i]["prompt"] == rollouts[j]["prompt"] for i, j in pairs)


def test_a_data_loader_reads_it(flux, result, tmp_path):
    """Calls of several numbers of scorings, too, and prompts that are not known."""
    rollouts = Rollouts(tmp_path)
    rollouts.add(result)
    rollouts.add(flux.steer("a bird", num_transitions=2))
    rollouts.add(dataclasses.replace(result.samples(), prompts=(None,) * 8))
    batch = next(iter(torch.utils.data.DataLoader(rollouts, batch_size=20, collate_fn=rollouts.collate)))
    assert torch.equal(batch["latents"][:8], result.latents)
    assert batch["prompt"] == [*result.samples().prompts, *["a bird"] * 4, *[None] * 8]
    assert [len(lineage) for lineage in batch["lineage"]] == [3] * 8 + [2] * 4 + [3] * 8
    with pytest.raises(TypeError, match="slice"):
        rollouts[:2]


def test_keys_may_be_numbers(result, tmp_path):
    rollouts = Rollouts(tmp_path)
    assert 3 not in rollouts
    rollouts.add(result, key=3)
    assert 3 in rollouts
    assert 3 in Rollouts(tmp_path)
    assert not rollouts.add(result, key="3")


def test_datasets_read_it(result, tmp_path):
    rollouts = Rollouts(tmp_path / "rollouts")
    rollouts.add(result)
    table = datasets.Dataset.from_generator(rollouts.rows, cache_dir=str(tmp_path / "cache"))
    assert isinstance(table[0]["image"], Image.Image)
    assert table["reward"][:] == result.image_rewards.tolist()
    assert len(datasets.load_dataset("json", data_files=str(tmp_path / "rollouts" / "rollouts.jsonl"), split="train",
                                     cache_dir=str(tmp_path / "cache"))) == 8  # fmt: skip


def test_trajectories(flux, tmp_path):
    out = flux.steer(PROMPTS, num_transitions=6, record=True, reward_scale=1, ess_threshold=1)
    rollouts = Rollouts(tmp_path)
    rollouts.add(out, key="recorded")
    rollouts.add(flux.steer(PROMPTS, reward_scale=1), key="not")
    taken = Rollouts(tmp_path).trajectories("recorded")
    assert all(torch.equal(one, other) for one, other in zip(taken, out.trajectories, strict=True))
    assert rollouts.trajectories("not") is None
    with pytest.raises(KeyError, match="expected the key of a call"):
        rollouts.trajectories("neither")


def test_half_precision(flux, tmp_path):
    flux.pipe.to(torch.bfloat16)
    out = flux.steer(reward_scale=1)
    rollouts = Rollouts(tmp_path)
    rollouts.add(out)
    assert rollouts[0]["latents"].dtype == torch.bfloat16
    assert torch.equal(rollouts[0]["latents"], out.latents[0])
    assert next(rollouts.rows())["latents"].dtype == np.float32
