"""Resemblance to a picture, everywhere or within a mask, of one picture or one for each prompt."""

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from glassflows.rewards import Resemblance, Sum


def pictures(number, height=6, width=10, seed=0):
    return torch.rand(number, 3, height, width, generator=tiny.seeded(seed))


def test_root_mean_square():
    picture, images = pictures(1), pictures(5, seed=1)
    expected = [-100 * float(np.sqrt(np.mean((image.numpy() - picture[0].numpy()) ** 2))) for image in images]
    torch.testing.assert_close(Resemblance(picture)(images), torch.tensor(expected))
    assert float(Resemblance(picture)(picture)) == pytest.approx(0, abs=1e-3)


def test_only_within_the_mask():
    picture, images, mask = pictures(1), pictures(5, seed=1), torch.zeros(1, 3, 6, 10)
    mask[..., :4] = 1
    changed = images.clone()
    changed[..., 4:] = 0.5
    reward = Resemblance(picture, mask)
    assert torch.equal(reward(images), reward(changed))
    torch.testing.assert_close(reward(images), Resemblance(picture[..., :4])(images[..., :4]))


def test_pictures_of_pil():
    array = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)
    image = Image.fromarray(array)
    tensor = torch.from_numpy(array).movedim(-1, 0)[None] / 255
    images = pictures(5, seed=1)
    torch.testing.assert_close(Resemblance(image)(images), Resemblance(tensor)(images))
    left = Image.fromarray(np.uint8([[255] * 4 + [0] * 6] * 6))
    mask = (torch.arange(10) < 4).float().expand(1, 3, 6, 10)
    torch.testing.assert_close(Resemblance(image, left)(images), Resemblance(tensor, mask)(images))


def test_a_picture_for_each_prompt():
    a, b = pictures(1, seed=1), pictures(1, 12, 20, seed=2)  # of another size
    images = pictures(4, seed=3)
    scores = Resemblance({"a cat": a, "a dog": b})(images, ["a dog", "a cat", "a cat", "a dog"])
    torch.testing.assert_close(scores[[1, 2]], Resemblance(a)(images[1:3]))
    torch.testing.assert_close(scores[[0, 3]], Resemblance(b)(images[[0, 3]]))


def test_gradients_lead_to_the_picture():
    picture = pictures(1)
    same = picture.clone().requires_grad_()
    other = pictures(5, seed=1).requires_grad_()
    for images in (same, other):
        (gradient,) = torch.autograd.grad(Resemblance(picture)(images).sum(), images)
        assert gradient.isfinite().all()
    assert float((gradient * (picture - other).detach()).sum()) > 0


def test_half_precision():
    """Sums and gradients are those of float32."""
    picture, mask = pictures(1, 64, 64), torch.ones(1, 1, 64, 64)
    images = pictures(2, 64, 64, seed=1).half()
    expected = Resemblance(picture)(images.float())
    torch.testing.assert_close(Resemblance(picture, mask)(images), expected, atol=1e-2, rtol=0)
    same = picture.half().float().half().requires_grad_()
    (gradient,) = torch.autograd.grad(Resemblance(same.detach().float())(same).sum(), same)
    assert gradient.isfinite().all()
    assert repr(Resemblance(picture, mask)) == "Resemblance(a picture, within a mask)"


def test_it_steers_an_edit(toy):
    """Particles that are chosen by it are nearer to the picture."""
    height, width = 16, 24
    reward = Resemblance(torch.full((1, 3, height, width), 0.2))
    chosen, plain = (toy.steer(reward=reward, reward_scale=scale, ess_threshold=1.0) for scale in (10.0, 0.0))
    assert chosen.rewards.mean() > plain.rewards.mean()
    mixed = toy.steer(reward=Sum(tiny.brightness, reward, weights=[0.1, 1]), reward_scale=1.0)
    assert mixed.rewards.isfinite().all()


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: Resemblance(pictures(2)), "picture: expected one image, got 2"),
        (lambda: Resemblance(pictures(1), torch.zeros(1, 3, 6, 10)), "mask: expected white"),
        (lambda: Resemblance(255 * pictures(1)), r"expected values in \[0, 1\]"),
        (
            lambda: Resemblance({"a cat": pictures(1)})(pictures(2), ["a cat", "a dog"]),
            "which have a picture, got 'a dog'",
        ),
        (lambda: Resemblance({"a cat": pictures(1)})(pictures(2)), "got None"),
        (
            lambda: Resemblance({"a cat": pictures(1)})(pictures(2), ["a cat"]),
            "expected one for each of 2 images, got 1",
        ),
        (lambda: Resemblance({"a cat": pictures(1)})(pictures(1), [{"a": "dict"}]), "got {'a': 'dict'}"),
        (lambda: Resemblance({}), "expected one for each prompt"),
    ],
)
def test_refusals(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()
