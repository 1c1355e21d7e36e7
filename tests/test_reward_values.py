"""Scores and images keep their values: nothing is rounded, cut off, or taken for something else."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils import _pytree as pytree

import checkpoints
import tiny
from glassflows import FeynmanKacSteerer, value
from glassflows.rewards import (
    AestheticScore,
    CLIPScore,
    HPSv2,
    ImageReward,
    Negate,
    Product,
    Standardize,
    Sum,
    VLMReward,
    as_reward,
)
from glassflows.rewards.images import as_tensors
from glassflows.smc import filter
from glassflows.smc.resampling import RESAMPLING
from glassflows.steering.strategy import Decision, Outcome

NEAR = [1e8, 1e8 + 1]  # the same number in float32
GIVEN = torch.full((2, 3, 4, 4), 0.5)


def returning(scores):
    """Return a reward with these scores."""

    def reward(images, prompts):
        return scores

    return reward


class OnMPS(torch.Tensor):
    """A tensor that says it is on MPS and has what a tensor has there: everything but float64."""

    @staticmethod
    def __new__(cls, held):
        new = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device="mps")
        new.held = held
        return new

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            if kwargs.get("dtype") not in (None, args[0].dtype):
                raise TypeError("MPS casts before it moves, and has no float64")
            return args[0].held.clone()
        given = pytree.tree_map(lambda one: one.held if isinstance(one, OnMPS) else one, (args, kwargs))
        return pytree.tree_map(cls._there, function(*given[0], **given[1]))

    def to(self, *args, **kwargs):
        """Go anywhere, and nowhere if it is to go to MPS, for which torch would look."""
        return self if args == (self.device,) else super().to(*args, **kwargs)

    @classmethod
    def _there(cls, held):
        if not isinstance(held, torch.Tensor):
            return held
        if held.dtype == torch.float64:
            raise TypeError("MPS has no float64")
        return cls(held)


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, np.array], ids=["list", "tuple", "numpy"])
@pytest.mark.parametrize(
    ("compose", "expected"),
    [
        (lambda reward: Sum(reward, reward, weights=[1, 0.5]), [1.5e8, 1.5e8 + 1.5]),
        (lambda reward: Product(reward), NEAR),
        (lambda reward: Negate(reward), [-1e8, -1e8 - 1]),
        (lambda reward: Standardize(reward, mean=1e8, std=0.5), [0, 2]),
        (lambda reward: Standardize.fitted(reward, GIVEN), [-(0.5**0.5), 0.5**0.5]),
    ],
    ids=["Sum", "Product", "Negate", "Standardize", "fitted"],
)
def test_numbers_of_python_are_not_rounded(kind, compose, expected):
    assert compose(returning(kind(NEAR)))(GIVEN).tolist() == pytest.approx(expected, rel=1e-15)


def test_large_numbers_are_numbers():
    assert Sum(returning([1e39, -1e39]))(GIVEN).tolist() == [1e39, -1e39]
    assert Sum(returning([2**70, 1]))(GIVEN).tolist() == [2.0**70, 1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.bool], ids=str)
def test_whole_scores_are_numbers(dtype):
    """Not bytes, of which −1 is 255."""
    scores = torch.tensor([0, 1, 1]).to(dtype)
    assert Negate(returning(scores))(GIVEN).tolist() == [0, -1, -1]
    assert Standardize(returning(scores), mean=1, std=0.25)(GIVEN).tolist() == [-4, 0, 0]
    assert Sum(returning(scores), returning([2.0**60 + 2**9, 0, 0]))(GIVEN)[0] == 2.0**60 + 2**9
    assert Product(returning(scores), weights=[2])(GIVEN).tolist() == [0, 1, 1]


def test_the_worst_stays_the_worst():
    scores = torch.tensor([0, 3, 200], dtype=torch.uint8)
    assert Negate(returning(scores))(GIVEN).argsort().tolist() == [2, 1, 0]
    assert Sum(returning(scores), returning(scores))(GIVEN).tolist() == [0, 6, 400]


def test_tensors_of_floats_keep_their_dtype():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        scores = torch.tensor([0.25, 0.5], dtype=dtype)
        assert Sum(returning(scores)).parts(GIVEN)["reward"].dtype == dtype
        assert Negate(returning(scores))(GIVEN).dtype == dtype


def test_a_part_that_returns_nothing():
    with pytest.raises(ValueError, match="reward returned None; expected one score per image"):
        Sum(returning(None))(GIVEN)


def test_values_of_numbers_of_python_are_not_rounded():
    """log E[exp r] = r of a constant r."""

    def gaussian(x, t):
        return t * x / (t**2 + (1 - t) ** 2)

    x_t = torch.randn(2, 3, generator=tiny.seeded())
    for score in (1e8 + 1, 1e39):
        found = value(gaussian, x_t, 0.5, lambda z, s=score: [s] * len(z), num_samples=4, num_steps=2)
        assert found.tolist() == [score, score]


@pytest.mark.parametrize("kind", ["list", "bool", "mps"])
def test_steerers_take_scores_of_every_kind(kind):
    expected = {"list": NEAR, "bool": [0, 1], "mps": [0.25, 0.5]}[kind]
    scores = {"list": NEAR, "bool": [False, True], "mps": OnMPS(torch.tensor([0.25, 0.5]))}[kind]
    steerer = FeynmanKacSteerer(tiny.flux(), returning(scores), 2, num_transitions=2, reward_scale=1)
    out = steerer("a cat", num_inference_steps=2, generator=tiny.seeded(), output_type="pt", **tiny.FLUX_CALL)
    assert out.rewards.tolist() == [expected]


# ---- devices without float64 -----------------------------------------------------------------------------------------


def test_the_stand_in_for_mps_has_no_float64():
    there = OnMPS(torch.tensor([0.25, 0.5]))
    assert (there + 1).device.type == "mps"
    assert there.cpu().double().tolist() == [0.25, 0.5]
    for wrong in (lambda: there.double(), lambda: there.to("cpu", torch.float64)):
        with pytest.raises(TypeError, match="MPS"):
            wrong()


def test_scores_on_mps():
    there = returning(OnMPS(torch.tensor([0.25, 0.5])))
    whole = returning(OnMPS(torch.tensor([1, 2], dtype=torch.uint8)))
    fitted = Standardize.fitted(there, GIVEN)
    assert (fitted.mean, fitted.std) == (0.375, pytest.approx(0.125 * 2**0.5))
    assert Sum(there)(GIVEN).device.type == "mps"
    for first, second in ((there, returning(NEAR)), (returning(NEAR), there)):
        both = Sum(first, second)(GIVEN)
        assert both.device.type == "cpu"
        assert both.tolist() == [1e8 + 0.25, 1e8 + 1.5]
    assert Negate(whole)(GIVEN).tolist() == [-1, -2]
    assert Sum(there, whole)(GIVEN).tolist() == [1.25, 2.5]


def test_values_on_mps():
    x_t = torch.randn(2, 3, generator=tiny.seeded())
    found = value(lambda x, t: x, x_t, 0.5, lambda z: OnMPS(torch.full((4,), 0.25)), num_samples=2, num_steps=1)
    assert found.tolist() == [0.25, 0.25]
    assert found.dtype == torch.float64


# ---- torch's defaults ------------------------------------------------------------------------------------------------


KINDS = {
    "HPSv2": (HPSv2, checkpoints.hpsv2),
    "AestheticScore": (AestheticScore, checkpoints.aesthetic),
    "ImageReward": (ImageReward, checkpoints.image_reward),
}
# whose CLIP transformers 4 reads in the default dtype
READ = ["HPSv2", pytest.param("AestheticScore", marks=tiny.TRANSFORMERS_5), "ImageReward"]


@pytest.mark.parametrize("name", READ)
def test_models_are_read_in_their_dtype_whatever_the_default(name, tmp_path):
    kind, write = KINDS[name]
    folder = write(tmp_path)
    expected = kind.from_pretrained(folder).networks.state_dict()
    torch.set_default_dtype(torch.float16)
    try:
        reward = kind.from_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(reward.networks.state_dict(), expected, rtol=0, atol=0)


def test_scores_and_filters_are_on_the_cpu_whatever_the_default():
    """A default device without float64, or without values, changes nothing."""

    def run():
        scores = Sum(returning(NEAR), returning([True, False]))(GIVEN)
        state = filter.init(2, 8)
        found = [scores, *vars(state).values()]
        rewards = torch.linspace(0, 2, 16, dtype=torch.float64, device="cpu").view(2, 8)
        for resampling in RESAMPLING.values():
            generators = [tiny.seeded(1), tiny.seeded(2)]
            state, info = filter.step(
                filter.init(2, 8), rewards, ess_threshold=1, generators=generators, resampling=resampling
            )
            found += [*vars(state).values(), *vars(info).values()]
        return [*found, filter.scale_for_ess(rewards, 0.3), *Decision.keep(rewards)[:4], *Outcome.without_law(rewards)]

    plain = run()
    with torch.device("meta"):
        elsewhere = run()
    torch.testing.assert_close(elsewhere, plain, rtol=0, atol=0, equal_nan=True)
    assert {one.device.type for one in elsewhere} == {"cpu"}


# ---- images ----------------------------------------------------------------------------------------------------------


def ramp(white, dtype):
    """Return a grey image from black to white."""
    return (np.linspace(0, 1, 12).reshape(3, 4) * white).astype(dtype)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_pictures_of_16_bits(mode):
    grey = ramp(65535, np.uint16)
    picture = Image.frombytes(mode, (4, 3), grey.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    [tensor] = as_tensors(picture)
    expected = torch.from_numpy(grey / 65535).float().expand(1, 3, -1, -1)
    torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-7)


def test_pictures_of_floats():
    grey = ramp(1, np.float32)
    [tensor] = as_tensors([Image.fromarray(grey)])
    assert torch.equal(tensor, torch.from_numpy(grey).expand(1, 3, -1, -1))
    for wrong, got in ((ramp(255, np.float32), "0 to 255: .* images / 255"), (grey * np.nan, "nan")):
        with pytest.raises(ValueError, match=rf"images: expected values in \[0, 1\], got {got}"):
            as_tensors(Image.fromarray(wrong))


def test_pictures_of_unknown_white():
    with pytest.raises(ValueError, match="expected PIL images of a known white, got mode I .* to floats"):
        as_tensors(Image.fromarray(ramp(65535, np.int32)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_pictures_of_bytes_are_as_pil_converts_them(mode):
    picture = Image.fromarray(ramp(255, np.uint8)).convert("RGB").convert(mode)
    expected = torch.from_numpy(np.array(picture.convert("RGB"))).movedim(-1, 0) / 255
    [tensor] = as_tensors(picture)
    torch.testing.assert_close(tensor[0], expected, rtol=0, atol=1e-7)


def test_pictures_of_several_kinds_together():
    """The same grey, in 8 bits, 16 bits and floats."""
    pictures = [
        Image.fromarray(np.full((3, 4), 51, np.uint8)),
        Image.fromarray(np.full((3, 4), 13107, np.uint16)),
        Image.fromarray(np.full((3, 4), 0.2, np.float32)),
        Image.new("RGB", (4, 3), (51, 51, 51)),
    ]
    [tensor] = as_tensors(pictures)
    torch.testing.assert_close(tensor, torch.full((4, 3, 3, 4), 0.2), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", [CLIPScore, VLMReward], ids=["CLIPScore", "VLMReward"])
def test_grey_pictures_are_scored_as_colour_pictures(kind, tmp_path):
    reward = kind.from_pretrained((checkpoints.clip if kind is CLIPScore else checkpoints.vlm)(tmp_path))
    grey = ramp(255, np.uint8)
    plain = reward(Image.fromarray(grey).convert("RGB"), "a circle")
    assert torch.equal(reward(Image.fromarray(grey), "a circle"), plain)
    fine = Image.fromarray(grey.astype(np.uint16) * 257)  # 257 · 255 = 65535
    torch.testing.assert_close(reward(fine, "a circle"), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "advice"),
    [
        ((3, 8, 9), "one image is a batch of one: images[None]"),
        ((8, 9, 3), "one image is a batch of one: images[None]"),
        ((2, 8, 9, 3), "put the channels second, after the images: images.movedim(-1, 1)"),
        ((2, 1, 8, 9), "give grey images three equal channels: images.expand(-1, 3, -1, -1)"),
        ((2, 16, 8, 9), "give images of red, green and blue, the channels second (latents are decoded first)"),
    ],
    ids=["one image", "one image, channels last", "channels last", "grey", "latents"],
)
def test_tensors_of_other_shapes(shape, advice, tmp_path):
    message = f"images: expected shape (N, 3, H, W), got {shape}: {advice}"
    with pytest.raises(ValueError, match=re.escape(message)):
        CLIPScore(tmp_path)(torch.zeros(shape), ["a", "b"])


def test_the_advice_for_tensors_of_other_shapes_helps():
    grey, last, one = torch.rand(2, 1, 8, 9), torch.rand(2, 8, 9, 3), torch.rand(3, 8, 9)
    for mended in (grey.expand(-1, 3, -1, -1), last.movedim(-1, 1), one[None]):
        assert as_tensors(mended) == [mended]


def test_videos_of_other_shapes(tmp_path):
    with pytest.raises(ValueError, match=r"expected videos \(N, frames, 3, H, W\), got \(2, 3, 1, 8, 9\)"):
        CLIPScore(tmp_path)(torch.zeros(2, 3, 1, 8, 9), ["a", "b"])


def test_tensors_of_16_bits(tmp_path):
    with pytest.raises(ValueError, match="expected floats in .* got torch.uint16: divide by 65535"):
        CLIPScore(tmp_path)(torch.zeros(2, 3, 8, 9, dtype=torch.uint16), ["a", "b"])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_functions_get_pictures_of_the_colours_there_are(channels):
    images = (torch.rand(2, channels, 3, 4, generator=tiny.seeded()) * 255).round() / 255
    seen = []
    as_reward(lambda pictures, prompts: seen.extend(pictures))(images, ["a", "b"])
    assert [picture.mode for picture in seen] == [{1: "L", 3: "RGB", 4: "RGBA"}[channels]] * 2
    arrays = np.stack([np.asarray(picture).reshape(3, 4, channels) for picture in seen])
    np.testing.assert_allclose(arrays / 255, images.movedim(1, -1), atol=1e-6)
    as_reward(lambda arrays, prompts: seen.append(arrays), "numpy")(images, ["a", "b"])
    assert np.array_equal(seen[-1], images.movedim(1, -1))


@pytest.mark.parametrize("shape", [(3, 8, 9), (2, 8, 9, 3), (2, 16, 8, 9)], ids=str)
def test_functions_get_no_pictures_of_what_is_none(shape):
    with pytest.raises(ValueError, match="images: expected shape .* one image is a batch of one") as caught:
        as_reward(lambda pictures, prompts: [0.0] * len(pictures))(torch.zeros(shape), ["a", "b"])
    assert str(shape) in str(caught.value)
