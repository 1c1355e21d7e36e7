"""Frames: videos, scored by a reward of images on some of their frames."""

import numpy as np
import pytest
import torch

import tiny
from glassflows.rewards import AestheticScore, CLIPScore, Negate, Ranked, Sum
from glassflows.rewards.frames import Frames, picked
from toy_rewards import PROMPTS, WARNINGS, load

pytestmark = WARNINGS


def videos(number=3, frames=11, dtype=torch.float32):
    return torch.rand(number, frames, 3, 5, 7, generator=tiny.seeded()).to(dtype)


def redness(images, prompts):
    return images[:, 0].mean((1, 2))


# ---- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 5, 8, 9, 49, 81])
@pytest.mark.parametrize("number", [1, 2, 3, 8, 80, 100])
def test_frames_are_evenly_spaced(length, number):
    found = picked(length, number)
    assert len(found) == min(length, number)
    assert sorted(set(found)) == found
    if len(found) > 1:
        assert (found[0], found[-1]) == (0, length - 1)
        ideal = np.linspace(0, length - 1, len(found))
        assert np.abs(np.array(found) - ideal).max() <= 0.5
    else:
        assert abs(found[0] - (length - 1) / 2) <= 0.5


@pytest.mark.parametrize(("reduce", "of"), [("mean", np.mean), ("min", np.min)])
@pytest.mark.parametrize("frames", [1, 4, 20])
def test_scores_are_those_of_some_frames(frames, reduce, of):
    """Of each video its own, under its own prompt, in one call of the reward."""
    calls = []

    def reward(images, prompts):
        calls.append(list(prompts))
        return redness(images, prompts) + torch.tensor([len(prompt) for prompt in prompts])

    shown = videos()
    scores = Frames(reward, frames, reduce)(shown, PROMPTS)
    picks = picked(11, frames)
    red = shown[:, picks, 0].mean((-1, -2)).numpy()
    expected = [of(row) + len(prompt) for row, prompt in zip(red, PROMPTS, strict=True)]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert calls == [[prompt for prompt in PROMPTS for _ in picks]]


@pytest.mark.parametrize("name", ["CLIPScore", "AestheticScore"])
def test_all_frames_are_what_rewards_of_a_model_score(name, folders):
    reward = load(name, folders)
    whole = reward(videos(), PROMPTS)
    torch.testing.assert_close(Frames(reward, 11)(videos(), PROMPTS), whole, rtol=1e-5, atol=1e-5)
    some = Frames(reward, 3)(videos(), PROMPTS)
    torch.testing.assert_close(some, reward(videos()[:, [0, 5, 10]], PROMPTS), rtol=1e-5, atol=1e-5)
    assert (some - whole).abs().max() > 1e-4


def test_images_are_scored_as_by_the_reward(folders):
    reward = load("CLIPScore", folders)
    images = videos()[:, 0]
    assert torch.equal(Frames(reward)(images, PROMPTS), reward(images, PROMPTS))
    assert torch.equal(Frames(reward, reduce="min")(images, PROMPTS), reward(images, PROMPTS))


def test_rewards_without_prompts(folders):
    reward = load("AestheticScore", folders)
    expected = reward(videos()[:, [0, 10]].flatten(0, 1)).view(3, 2).amin(1)
    torch.testing.assert_close(Frames(reward, 2, "min")(videos()), expected, rtol=1e-5, atol=1e-6)
    assert Frames(lambda images, prompts: [float(prompts is None)] * len(images))(videos()).tolist() == [1, 1, 1]
    assert Frames(redness)(videos(1), "a rose").shape == (1,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_floats_keep_their_dtype(dtype):
    assert Frames(redness)(videos(dtype=dtype), PROMPTS).dtype == dtype


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=["list", "numpy", "integers"])
def test_other_scores_are_counted_in_float64(kind):
    near = 2**53 - 2  # whose sums float32 would round
    reward = Frames(lambda images, prompts: kind([near, near + 2] * 3), 2)
    scores = reward(videos(), PROMPTS)
    assert scores.dtype == torch.float64
    assert scores.tolist() == [near + 1] * 3


def test_gradients_go_to_the_frames_that_are_scored():
    leaf = videos(2, dtype=torch.float64).requires_grad_()
    Frames(redness, 3)(leaf, PROMPTS[:2]).sum().backward()
    share = torch.zeros_like(leaf)
    share[:, [0, 5, 10], 0] = 1 / (3 * 5 * 7)
    torch.testing.assert_close(leaf.grad, share, rtol=0, atol=1e-12)
    leaf.grad = None
    Frames(redness, 3, "min")(leaf, PROMPTS[:2]).sum().backward()
    worst = leaf.detach()[:, [0, 5, 10], 0].mean((2, 3)).argmin(1)
    share = torch.zeros_like(leaf)
    for row, frame in enumerate(worst):
        share[row, 5 * frame, 0] = 1 / (5 * 7)
    torch.testing.assert_close(leaf.grad, share, rtol=0, atol=1e-12)


# ---- among other rewards ---------------------------------------------------------------------------------------------


def test_frames_in_compositions(folders):
    clip, aesthetic = load("CLIPScore", folders), load("AestheticScore", folders)
    both = Sum(Frames(clip, 2), Frames(aesthetic, 3, "min"), weights=[1, 0.5])
    parts = both.parts(videos(), PROMPTS)
    assert list(parts) == ["Frames(CLIPScore)", "Frames(AestheticScore)"]
    expected = Frames(clip, 2)(videos(), PROMPTS) + 0.5 * Frames(aesthetic, 3, "min")(videos(), PROMPTS)
    torch.testing.assert_close(both(videos(), PROMPTS), expected)
    inside = Frames(Sum(clip, Negate(clip)), 2)
    torch.testing.assert_close(inside(videos(), PROMPTS), torch.zeros(3), rtol=0, atol=1e-5)
    assert Ranked(Frames(redness))(videos(), ["a rose"] * 3).sort().values.tolist() == [0, 0.5, 1]


def test_scale_and_models_are_those_of_the_reward(folders):
    assert Frames(redness).reward_scale == 1
    assert Frames(AestheticScore("nowhere")).reward_scale == AestheticScore.reward_scale
    reward = CLIPScore(folders["CLIPScore"])
    assert Frames(reward).load().rewards == {"CLIPScore": reward}
    assert reward.networks is not None
    assert repr(Frames(reward, 4, "min")) == "Frames(CLIPScore, frames=4, reduce='min')"


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_options_that_are_none():
    with pytest.raises(ValueError, match="frames: expected a positive number, got 0"):
        Frames(redness, 0)
    with pytest.raises(ValueError, match=r"reduce: expected one of \('mean', 'min'\), got 'max'"):
        Frames(redness, reduce="max")
    with pytest.raises(ValueError, match="Frames: expected rewards that score an image by itself, got Ranked"):
        Frames(Ranked(redness))


@pytest.mark.parametrize("shape", [(2, 3, 11, 5, 7), (2, 0, 3, 5, 7), (0, 4, 3, 5, 7)], ids=str)
def test_videos_of_other_shapes(shape):
    with pytest.raises(ValueError, match="images: expected videos .* put red, green and blue third") as caught:
        Frames(redness)(torch.zeros(shape), PROMPTS[:2])
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("prompts", [["a rose"], "a rose", ["a rose"] * 6], ids=["one", "a text", "six"])
def test_prompts_that_are_not_one_for_each_video(prompts):
    with pytest.raises(ValueError, match="prompts: expected one for each video, 3, got"):
        Frames(redness)(videos(), prompts)


@pytest.mark.parametrize(
    "returned", [1.0, [1.0, 2.0], torch.zeros(6, 1), None], ids=["one", "two", "column", "nothing"]
)
def test_rewards_that_do_not_score_each_frame(returned):
    with pytest.raises(ValueError, match="lambda> returned"):
        Frames(lambda images, prompts: returned, 2)(videos(), PROMPTS)
