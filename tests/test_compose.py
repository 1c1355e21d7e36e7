"""Rewards made of rewards."""

import pytest
import torch

import tiny
from glassflows import FeynmanKacSteerer
from glassflows.rewards import Negate, PickScore, Product, Standardize, Sum
from scenes import CALL, load_pipeline
from toy_rewards import PROMPTS, images


def red(images, prompts):
    return images[:, 0].mean((1, 2))


def blue(images, prompts):
    return images[:, 2].mean((1, 2)).double()


def test_compositions():
    given = images()
    r, b = red(given, None), blue(given, None)
    torch.testing.assert_close(Sum(red, blue, weights=[2, -0.5])(given, PROMPTS), 2 * r - 0.5 * b)
    torch.testing.assert_close(Sum(red, red)(given), 2 * r)
    torch.testing.assert_close(Product(red, blue, weights=[2, 0.5])(given), r**2 * b**0.5)
    torch.testing.assert_close(Product(red, Negate(blue))(given), -r * b)
    fitted = Standardize.fitted(red, given, PROMPTS)(given)
    assert (fitted.mean(), fitted.std()) == (pytest.approx(0, abs=1e-5), pytest.approx(1, rel=1e-5))
    torch.testing.assert_close(Standardize(red, mean=1, std=2)(given), (r - 1) / 2)
    assert Negate(PickScore()).reward_scale == 10
    assert Standardize(PickScore(), mean=21, std=0.5).reward_scale == 5
    parts = Sum(red, Negate(blue), red).parts(given, PROMPTS)
    assert list(parts) == ["red", "Negate", "red 2"]
    torch.testing.assert_close(parts["Negate"], -b)


@tiny.TRANSFORMERS_5
def test_compositions_keep_gradients_and_steer():
    leaf = images().requires_grad_()
    Sum(red, Standardize(blue, mean=0.5, std=0.1), weights=[1, 2])(leaf).sum().backward()
    assert (leaf.grad[:, 2].mean() / leaf.grad[:, 0].mean()).item() == pytest.approx(20, rel=1e-4)
    steerer = FeynmanKacSteerer(load_pipeline(), Sum(red, blue), 3, num_transitions=2, reward_scale=10)
    out = steerer("a red circle", num_inference_steps=4, generator=tiny.seeded(), output_type="pt", **CALL)
    torch.testing.assert_close(Sum(red, blue)(out.images), out.rewards.gather(1, out.order)[0])


def test_bad_compositions():
    with pytest.raises(ValueError, match="weights: expected one for each reward, 2, got 1"):
        Sum(red, blue, weights=[1])
    with pytest.raises(ValueError, match="weights: expected one for each reward, 0, got 0"):
        Product()
    with pytest.raises(ValueError, match=r"^Negate returned -0\.\d+, which has no power 0\.5: give it the weight 1"):
        Product(Negate(red), weights=[0.5])(images())
    with pytest.raises(ValueError, match=r"rewards returned shapes \[\(3,\), \(3, 20, 30\)\]"):
        Sum(red, lambda images, prompts: images[:, 0])(images())
    with pytest.raises(ValueError, match=r"^std: expected a positive number, got 0\.0"):
        Standardize.fitted(red, torch.ones(3, 3, 4, 4))
