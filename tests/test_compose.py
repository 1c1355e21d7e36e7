"""Rewards made of rewards."""

import numpy as np
import pytest
import torch

import tiny
from glassflows import FeynmanKacSteerer, SteeringResult
from glassflows.rewards import Frames, Minimum, Negate, OCRScore, PickScore, Product, Ranked, Standardize, Sum
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
    assert list(parts) == ["red", "Negate(blue)", "red 2"]
    torch.testing.assert_close(parts["Negate(blue)"], -b)
    torch.testing.assert_close(Minimum(red, blue, weights=[1, 0.9])(given), torch.minimum(r, 0.9 * b))


def test_ranks():
    """Units do not matter, ties share, and prompts do not mix."""
    given = torch.tensor([1.0, 3.0, 2.0, 2.0, 9.0]).view(-1, 1, 1, 1).expand(-1, 3, 2, 2) / 10
    prompts = ["a", "a", "b", "b", "a"]
    assert Ranked(red)(given, prompts).tolist() == pytest.approx([0, 0.5, 0.5, 0.5, 1])
    assert Ranked(red, Negate(blue), weights=[1, 3])(given, prompts).tolist() == pytest.approx([3, 2, 2, 2, 1])
    assert Ranked(red)(given[:1], "a").tolist() == [0.5]
    assert Ranked(red)(given).tolist() == [0, 0.75, 0.375, 0.375, 1]
    columns = torch.rand(2, 5, generator=tiny.seeded())
    torch.testing.assert_close(Ranked(red).joined({"red": columns}), columns.argsort().argsort() / 4)


@tiny.TRANSFORMERS_5
def test_compositions_keep_gradients_and_steer():
    leaf = images().requires_grad_()
    Sum(red, Standardize(blue, mean=0.5, std=0.1), weights=[1, 2])(leaf).sum().backward()
    assert (leaf.grad[:, 2].mean() / leaf.grad[:, 0].mean()).item() == pytest.approx(20, rel=1e-4)
    steerer = FeynmanKacSteerer(load_pipeline(), Sum(red, blue), 3, num_transitions=2, reward_scale=10)
    out = steerer("a red circle", num_inference_steps=4, generator=tiny.seeded(), output_type="pt", **CALL)
    torch.testing.assert_close(Sum(red, blue)(out.images), out.rewards.gather(1, out.order)[0])


@pytest.mark.parametrize("compose", [Sum, Minimum, Ranked])
def test_parts_are_kept(flux, compose):
    """At each scoring and at the end, whatever is scored at a time, and ranks are of all particles of a prompt."""
    given = {"reward_scale": 500.0, "ess_threshold": 1.0, "num_transitions": 3, "widths": (4, 3, 2)}
    out = flux.steer(["a cat", "a dog"], reward=compose(red, blue), num_particles=4, **given)
    few = flux.steer(["a cat", "a dog"], reward=compose(red, blue), num_particles=4, reward_batch_size=1, **given)
    assert torch.equal(few.ancestors, out.ancestors)
    torch.testing.assert_close(few.rewards, out.rewards, rtol=0, atol=1e-6)
    assert list(out.parts) == ["red", "blue"]
    scorings = len(out.transitions)
    assert scorings == 2
    for name, part in out.parts.items():
        assert part.shape == (scorings + 1, 2, 4), name
        assert torch.equal(part[:-1].isnan(), out.scored.isnan())
    for row, scored in zip(
        [{name: part[i] for name, part in out.parts.items()} for i in range(scorings + 1)],
        [*out.scored, out.rewards],
        strict=True,
    ):
        width = int(scored.isfinite().sum(1)[0])
        joined = compose(red, blue).joined({name: part[:, :width] for name, part in row.items()})
        torch.testing.assert_close(joined, scored[:, :width], rtol=0, atol=1e-6)


def test_parts_of_a_look_ahead_are_means_over_its_ends(flux):
    whole = flux.steer(reward=Sum(red, blue), look_ahead=1, look_ahead_samples=2, reward_scale=0.0)
    torch.testing.assert_close(whole.parts["red"][:-1] + whole.parts["blue"][:-1], whole.scored)


def test_parts_are_saved_and_shown(flux, tmp_path):
    out = flux.steer(reward=Sum(red, Negate(blue)), output_type="pil", reward_scale=300.0)
    again = SteeringResult.load(out.save(tmp_path))
    assert again == out
    assert list(again.parts) == ["red", "Negate(blue)"]
    assert "<br>Negate(blue) -0." in out._repr_html_()
    assert [axes.get_xlabel() for axes in out.plot().axes][2:] == [
        f"{name}:\nmean, best" for name in ("reward", "red", "Negate(blue)")
    ]
    assert flux.steer(reward=red, reward_scale=300.0).parts == {}


def test_what_compares_images_stands_alone(flux):
    with pytest.raises(ValueError, match="^Sum: expected rewards that score an image by itself, got Ranked"):
        Sum(red, Ranked(blue))
    with pytest.raises(ValueError, match="^twist: expected a reward with a gradient, got Ranked"):
        flux.steer(reward=Ranked(red, blue), twist=1.0)


@pytest.mark.filterwarnings("ignore:.*reward_scale=:UserWarning")
def test_scales_that_are_known_when_it_is_loaded(flux):
    """As those of a server are."""

    class Late:
        reward_scale = 1.0

        def load(self):
            self.reward_scale = 25.0

        def __call__(self, images, prompts):
            return red(images, prompts)

    for reward, scale in (
        (Negate(Late()), 25.0), (Standardize(Late(), mean=0, std=2), 50.0), (Frames(Late()), 25.0), (Sum(Late()), 1.0),
        (Ranked(Late(), red), 4.0),
    ):  # fmt: skip
        assert flux.steer(reward=reward, reward_scale=None, ess_threshold=0.0).reward_scale.tolist() == [scale]
    reward = Negate(Late())
    reward.reward_scale = 3.0
    assert reward.load().reward_scale == 3


def test_a_call_of_one_s_own_counts(flux):
    class Twice(Sum):
        def __call__(self, images, prompts=None):
            return 2 * super().__call__(images, prompts)

    out = flux.steer(reward=Twice(red, blue), reward_scale=300.0)
    np.testing.assert_allclose(out.image_rewards, 2 * (out.images[..., 0] + out.images[..., 2]).mean((1, 2)), atol=1e-5)
    assert out.parts == {}


def test_bad_scores_of_parts(flux):
    """Ranks would hide them."""

    def holes(images, prompts):
        scores = red(images, prompts)
        scores[1] = float("nan")
        return scores

    for compose in (Ranked, Minimum, Sum):
        with pytest.raises(ValueError, match="(holes|reward) returned .*nan.*expected finite scores"):
            flux.steer(reward=compose(red, holes))
    with pytest.raises(ValueError, match="holes returned .*expected finite scores, which have ranks"):
        Ranked(red, holes)(images())
    for prompts in ("a rose", ["a", "a"]):
        with pytest.raises(ValueError, match="prompts: expected one for each image, 3, got"):
            Ranked(red)(images(), prompts)


@pytest.mark.parametrize("compose", [Sum, Minimum, Ranked])
def test_parts_see_images_as_they_were(flux, compose):
    """Whatever another one writes into them, or into what it returns."""
    kept = torch.empty(8, dtype=torch.float64)

    def writing(images, prompts):
        images.zero_()
        return torch.arange(len(images))

    def reusing(images, prompts):
        return torch.mean(images.double(), (1, 2, 3), out=kept[: len(images)])

    plain = flux.steer(reward=compose(red, lambda images, prompts: [1.0] * len(images)), reward_scale=0.0)
    out = flux.steer(reward=compose(writing, red), reward_scale=0.0)
    torch.testing.assert_close(out.parts["red"], plain.parts["red"])
    for reward in (reusing, compose(reusing, red)):
        out = flux.steer(reward=reward, reward_scale=0.0, reward_batch_size=1)
        seen = out.parts["reusing"][-1] if out.parts else out.rewards
        np.testing.assert_allclose(seen.gather(1, out.order)[0], out.images.mean((1, 2, 3)), atol=1e-6)


def test_prompts_that_a_reward_brings_itself(flux, folders):
    class Fixed(PickScore):
        def __call__(self, images, prompts=None):
            return super().__call__(images, ["a cat"] * len(images))

    class Other:
        def check_prompts(self):
            raise AssertionError("never called")

        def __call__(self, images, prompts):
            return red(images, prompts)

    for reward in (Fixed(folders["PickScore"]), Sum(Fixed(folders["PickScore"]), Other())):
        assert flux.steer(reward=reward, reward_scale=0.0).rewards.isfinite().all()


def test_prompts_are_checked_before_anything_is_drawn(flux):
    calls = []
    flux.network.register_forward_pre_hook(lambda *args: calls.append(1))
    for reward in (OCRScore("nowhere"), Sum(red, Negate(OCRScore("nowhere")))):
        reward.load = lambda: None
        with pytest.raises(ValueError, match="prompts: expected the text that is to be read, in quotes, got 'a sign'"):
            flux.steer("a sign", reward=reward)
    assert calls == []


def test_bad_compositions():
    with pytest.raises(ValueError, match="weights: expected one for each reward, 2, got 1"):
        Sum(red, blue, weights=[1])
    with pytest.raises(ValueError, match="weights: expected one for each reward, 0, got 0"):
        Product()
    with pytest.raises(
        ValueError, match=r"^Negate\(red\) returned -0\.\d+, which has no power 0\.5: give it the weight 1"
    ):
        Product(Negate(red), weights=[0.5])(images())
    with pytest.raises(ValueError, match=r"rewards returned shapes \[\(3,\), \(3, 20, 30\)\]"):
        Sum(red, lambda images, prompts: images[:, 0])(images())
    with pytest.raises(ValueError, match=r"^std: expected a positive number, got 0\.0"):
        Standardize.fitted(red, torch.ones(3, 3, 4, 4))
