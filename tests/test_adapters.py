"""Rewards made of functions of pictures and arrays."""

import numpy as np
import pytest
import torch

import tiny
from glassflows.rewards import as_reward


@pytest.mark.parametrize("takes", ["pil", "numpy"])
def test_rewards_of_pictures_and_arrays(takes):
    seen = []

    def brightness(images, prompts):
        seen.append(images)
        return [float(np.asarray(image, dtype=np.float32).mean()) for image in images]

    images = torch.stack([torch.zeros(3, 4, 6), torch.ones(3, 4, 6)])
    scores = as_reward(brightness, takes)(images, ["a", "b"])
    assert scores == ([0.0, 255.0] if takes == "pil" else [0.0, 1.0])
    assert seen[0][0].size == ((6, 4) if takes == "pil" else 72)
    with pytest.raises(ValueError, match=r"^takes: expected one of \('pil', 'numpy'\), got 'jax'$"):
        as_reward(brightness, "jax")


def test_rewards_of_videos_and_sound():
    videos, seen = torch.rand(2, 5, 3, 4, 6, generator=tiny.seeded()), []
    as_reward(lambda arrays, prompts: seen.append(arrays), "numpy")(videos, [])
    assert torch.equal(torch.from_numpy(seen[0]), videos.movedim(2, -1))
    as_reward(lambda films, prompts: seen.append(films))(videos, [])
    assert [len(film) for film in seen[1]] == [5, 5]
    np.testing.assert_allclose(np.asarray(seen[1][1][3]) / 255, videos[1, 3].movedim(0, -1), atol=0.51 / 255)
    sound = torch.rand(2, 1, 32, generator=tiny.seeded())
    as_reward(lambda arrays, prompts: seen.append(arrays), "numpy")(sound, [])
    assert np.array_equal(seen[2], sound)
    with pytest.raises(ValueError, match="there are no pictures of sound"):
        as_reward(lambda films, prompts: None)(sound, [])
