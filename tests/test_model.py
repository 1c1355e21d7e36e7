"""What every reward does: batches, dtypes, gradients, prompts, and files that are missing or not its own."""

import inspect
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny
from glassflows import FeynmanKacSteerer
from glassflows.rewards import AestheticScore, CLIPScore, HPSv2, ImageReward, PickScore, Sum, VLMReward
from scenes import CALL, load_pipeline
from toy_rewards import FLOAT64, KINDS, PROMPTS, WARNINGS, images, load

pytestmark = WARNINGS


@pytest.mark.parametrize("name", KINDS)
def test_scores_do_not_depend_on_the_batch_or_the_kind_of_image(name, folders):
    reward = load(name, folders)
    whole = reward(images(), PROMPTS)
    assert whole.dtype == torch.float32
    assert whole.shape == (3,)
    single = torch.cat([reward(image[None], [prompt]) for image, prompt in zip(images(), PROMPTS, strict=True)])
    torch.testing.assert_close(single, whole, rtol=1e-4, atol=1e-5)
    seen, networks = [], next(iter(reward.networks.values()))
    networks.register_forward_pre_hook(lambda module, args: seen.append(1))
    reward.batch_size = 2
    torch.testing.assert_close(reward(images(), PROMPTS), whole, rtol=1e-4, atol=1e-5)
    assert len(seen) == 2
    pictures = [Image.fromarray((image * 255).byte().movedim(0, -1).numpy()) for image in images()]
    torch.testing.assert_close(reward(pictures, PROMPTS), whole, rtol=1e-4, atol=1e-5)
    other = Image.new("RGBA", (17, 40), (200, 30, 30, 255))
    mixed = reward([*pictures, other], [*PROMPTS, "red"])
    torch.testing.assert_close(mixed[:3], whole, rtol=1e-4, atol=1e-5)
    videos = images(6).unflatten(0, (2, 3))
    frames = reward(videos.flatten(0, 1), [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3).view(2, 3)
    torch.testing.assert_close(reward(videos, PROMPTS[:2]), frames.mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FLOAT64 if name != "VLMReward"])
def test_gradients_are_those_of_finite_differences(name, folders):
    """In float64, through the resizing."""
    reward = load(name, folders, dtype=torch.float64)
    point = 0.25 + 0.5 * images(1, 18, 21).double()
    direction = torch.randn(point.shape, generator=tiny.seeded(1), dtype=torch.float64)
    leaf = point.clone().requires_grad_()
    reward(leaf, PROMPTS[:1]).sum().backward()
    slope = (leaf.grad * direction).sum()
    step = 1e-5 * direction
    expected = (reward(point + step, PROMPTS[:1]) - reward(point - step, PROMPTS[:1])).sum() / 2e-5
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-9)
    assert abs(slope) > 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_half_precision(name, folders):
    """Scores of many images stay apart: what is summed at the end is summed in float32."""
    exact, half = load(name, folders), load(name, folders, dtype=torch.bfloat16)
    scores = half(images().bfloat16(), PROMPTS)
    assert scores.dtype == torch.float32
    assert (scores - exact(images(), PROMPTS)).abs().max() < 0.1 * (1 + exact(images(), PROMPTS).abs().max())
    if name not in ("VLMReward", "CLIPScore"):  # of which several may be 0
        assert len(half(images(32), [PROMPTS[0]] * 32).unique()) >= 30


@pytest.mark.slow
@tiny.TRANSFORMERS_5
@pytest.mark.parametrize("name", KINDS)
def test_steers_the_scenes_pipeline(name, folders):
    reward = load(name, folders)
    steerer = FeynmanKacSteerer(load_pipeline(), reward, 3, num_transitions=2, reward_scale="auto")
    out = steerer("a red circle", num_inference_steps=4, generator=tiny.seeded(), output_type="pt", **CALL)
    torch.testing.assert_close(
        reward(out.images, ["a red circle"] * 3).double(), out.rewards.gather(1, out.order)[0], rtol=1e-4, atol=1e-5
    )
    assert out.ledger.reward_calls == 6
    assert FeynmanKacSteerer(load_pipeline(), reward).reward_scale == type(reward).reward_scale


@pytest.mark.parametrize("name", FLOAT64)
def test_moves_with_its_model(name, folders):
    reward = KINDS[name][0](folders[name]).to(dtype=torch.float64)
    assert reward.networks is None
    assert reward(images(), PROMPTS).dtype == torch.float64
    assert reward.to("cpu", torch.float32)(images(), PROMPTS).dtype == torch.float32


def test_long_prompts_are_cut_with_one_warning(folders):
    long = "a red circle above two blue squares and a green triangle"
    for name in ("CLIPScore", "ImageReward"):
        reward = load(name, folders)
        limit = 16 if name == "CLIPScore" else 35
        with pytest.warns(UserWarning, match=f"{name} reads the first {limit} tokens of a prompt"):
            first = reward(images(), [long] * 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(reward(images(), [long + " on white"] * 3), first)


def test_warnings_point_at_the_users_line(folders):
    """That of the score, through rewards that are put together too, or of the steered call."""
    long = "a red circle above two blue squares and a green triangle"
    both, toy = Sum(load("CLIPScore", folders), load("PickScore", folders)), tiny.Toy(tiny.sd)
    steerer = toy.steerer(reward=load("CLIPScore", folders), reward_scale="auto")
    for score in (
        lambda: (load("CLIPScore", folders)(images(), [long] * 3), here_line()),
        lambda: (both(images(), [long] * 3), here_line()),
        lambda: (steerer(**toy.arguments(long)), here_line()),
    ):
        with pytest.warns(UserWarning, match="reads the first 16 tokens") as caught:
            _, line = score()
        told = [one for one in caught if "reads the first" in str(one.message)]
        assert {(one.filename, one.lineno) for one in told} == {(__file__, line)}


def here_line():
    """Return the line that calls this."""
    return inspect.currentframe().f_back.f_lineno


def test_bad_prompts(folders):
    reward = load("CLIPScore", folders)
    with pytest.raises(ValueError, match="prompts: expected one for each image, 2, got 1"):
        reward(images(6).unflatten(0, (2, 3)), PROMPTS[:1])
    with pytest.raises(ValueError, match="prompts: expected one for each image, 3, got 2"):
        reward(images(), PROMPTS[:2])
    with pytest.raises(ValueError, match="CLIPScore scores images under their prompts, got None"):
        reward(images(), [None] * 3)
    with pytest.raises(ValueError, match="prompts: expected one for each image, 3, got 1"):
        reward(images())


def unread(name, source):
    """Return what the message matches where a reward has no files: where it looked, why not, what it needs."""
    return rf"^{name} could not be read from {re.escape(str(source))}[^:]*: [\s\S]*\nIt needs "


ADVICE = {
    "CLIPScore": "CLIPScore.from_pretrained('/model', processor='/processor')",
    "PickScore": "hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "HPSv2": "hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "AestheticScore": "hf download openai/clip-vit-large-patch14",
    "ImageReward": "hf download bert-base-uncased",
    "VLMReward": "VLMReward.from_pretrained('/model')",
}


@pytest.mark.parametrize("name", KINDS)
def test_missing_files_say_what_to_do(name, folders, tmp_path, monkeypatch):
    """Offline and in an empty folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reward = KINDS[name][0](tmp_path)
    with pytest.raises(OSError, match=unread(name, tmp_path)) as caught:
        reward(images(), PROMPTS)
    assert ADVICE[name] in str(caught.value)
    assert f"hf download {tmp_path}" not in str(caught.value)
    with pytest.raises(
        OSError, match=unread(name, "nobody/nothing-at-all") + r"[\s\S]*hf download nobody/nothing-at-all"
    ):
        KINDS[name][0].from_pretrained("nobody/nothing-at-all")


@pytest.mark.parametrize("name", ["CLIPScore", "PickScore", "HPSv2", "ImageReward"])
def test_tokenizers_of_nothing_are_refused(name, folders, tmp_path, monkeypatch):
    """transformers 5 makes them of folders without a vocabulary, and scores everything alike."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    bare = Path(shutil.copytree(folders[name], tmp_path / "bare"))
    for file in ("vocab.json", "merges.txt", "vocab.txt"):
        (bare / file).unlink(missing_ok=True)
    with pytest.raises(OSError, match=unread(name, bare)):
        KINDS[name][0].from_pretrained(bare)
    option = "tokenizer" if name == "ImageReward" else "processor"
    reward = KINDS[name][0].from_pretrained(bare, **{option: folders[name]})
    assert torch.equal(reward(images(), PROMPTS), load(name, folders)(images(), PROMPTS))


def test_checkpoints_of_another_kind_are_refused(folders, tmp_path):
    """Nothing but tensors is read of a pickle, and no other model's."""
    pickled, other, cut = (
        Path(shutil.copytree(folders["HPSv2"], tmp_path / name)) for name in ("pickled", "other", "cut")
    )
    torch.save({"state_dict": {"visual": Path("/")}}, pickled / HPSv2.checkpoint)
    shutil.copy(folders["ImageReward"] / "ImageReward.pt", other / HPSv2.checkpoint)
    (cut / HPSv2.checkpoint).write_bytes((folders["HPSv2"] / HPSv2.checkpoint).read_bytes()[:1000])
    reasons = {
        pickled: r"Weights only load failed\.[\s\S]* Unsupported global: GLOBAL pathlib\.",
        other: r"'visual\.positional_embedding'\nIt needs HPS_v2\.1_compressed\.pt, or ",
        cut: "PytorchStreamReader failed reading zip archive",
    }
    for folder, reason in reasons.items():
        with pytest.raises(OSError, match=rf"^HPSv2 could not be read from {re.escape(str(folder))}: {reason}"):
            HPSv2.from_pretrained(folder)


def test_default_checkpoints():
    """What is asked for where nothing is named."""
    defaults = {cls.__name__: cls().name for cls, _ in KINDS.values() if cls is not VLMReward}
    assert defaults == {
        "CLIPScore": "openai/clip-vit-large-patch14",
        "PickScore": "yuvalkirstain/PickScore_v1",
        "HPSv2": "xswu/HPSv2",
        "AestheticScore": "trl-lib/ddpo-aesthetic-predictor",
        "ImageReward": "zai-org/ImageReward",
    }
    assert PickScore().processor == HPSv2().processor == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert HPSv2("adams-story/HPSv2-hf").processor == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert CLIPScore("openai/clip-vit-base-patch32").processor == "openai/clip-vit-base-patch32"
    assert AestheticScore().clip == "openai/clip-vit-large-patch14"
    assert ImageReward()._sources() == ["zai-org/ImageReward", "bert-base-uncased"]
    assert CLIPScore(device="meta").device.type == "meta"


@pytest.mark.slow
def test_nothing_is_imported_before_it_is_needed():
    code = """
import sys, glassflows
from glassflows.rewards import PickScore
def heavy(): return {"transformers", "torchvision", "matplotlib"} & set(sys.modules)
assert glassflows.GLASSScheduler and not heavy(), heavy()
reward = PickScore()
assert not heavy(), heavy()
glassflows.FeynmanKacSteerer, glassflows.SteeringResult, glassflows.rewards
assert set(glassflows.__all__) <= set(dir(glassflows))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
