"""How models are read: once, before the run if asked to, by many threads, and from no file that is not one."""

import copy
import pickle
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import checkpoints
import tiny
from glassflows.rewards import (
    AestheticScore,
    CLIPScore,
    HPSv2,
    ImageReward,
    Negate,
    PickScore,
    Product,
    Standardize,
    Sum,
    VLMReward,
)
from glassflows.rewards.model import linear_head, num_layers, state_of

THREADS = 8
KINDS = {
    "CLIPScore": (CLIPScore, checkpoints.clip),
    "PickScore": (PickScore, checkpoints.clip),
    "HPSv2": (HPSv2, checkpoints.hpsv2),
    "AestheticScore": (AestheticScore, checkpoints.aesthetic),
    "ImageReward": (ImageReward, checkpoints.image_reward),
    "VLMReward": (VLMReward, checkpoints.vlm),
}
WORDS = ["a red circle", "two squares", "red", "a blue square or two red squares", "a circle"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*slow image processor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*reads the first 16 tokens:UserWarning"),
]


def counting(reward):
    """Return the reward and a list that grows whenever its model is read."""
    reads, read = [], reward._read

    def slowly():
        reads.append(threading.get_ident())
        time.sleep(0.05)  # so that other threads come meanwhile
        return read()

    reward._read = slowly
    return reward, reads


def batches(number):
    """Return images and prompts of several lengths, in batches of 1 to 3."""
    return [
        (torch.rand(1 + i % 3, 3, 20, 17, generator=tiny.seeded(i)), [WORDS[(i + j) % 5] for j in range(1 + i % 3)])
        for i in range(number)
    ]


def in_threads(function, given):
    """Return function(*arguments) of all arguments, computed by threads that begin together."""
    begin = threading.Barrier(THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        for waiting in [pool.submit(begin.wait) for _ in range(THREADS)]:
            waiting.result()
        return list(pool.map(lambda arguments: function(*arguments), given))


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_scores_of_many_threads_are_those_of_one(name, tmp_path):
    """The model is read once, and no tokenizer is told by one thread how to pad the texts of another."""
    kind, write = KINDS[name]
    folder, given = write(tmp_path), batches(96)
    alone = kind.from_pretrained(folder)
    expected = [alone(*one) for one in given]
    reward, reads = counting(kind(folder))
    found = in_threads(reward, given)
    assert len(reads) == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["CLIPScore", "ImageReward"])
def test_no_tokenizer_is_called_by_two_threads_at_once(name, tmp_path):
    """It holds how the texts of one call are cut and padded."""
    kind, write = KINDS[name]
    reward, now, most = kind.from_pretrained(write(tmp_path)), [], []
    tokenizer = reward.tokenizer

    def watched(*args, **options):
        now.append(1)
        most.append(len(now))
        time.sleep(0.005)
        tokens = tokenizer(*args, **options)
        now.pop()
        return tokens

    reward.tokenizer = watched
    in_threads(reward, batches(THREADS))
    assert most == [1] * 2 * THREADS


@pytest.mark.slow
def test_compositions_are_shared_by_threads(tmp_path):
    given = batches(48)
    folders = [write(tmp_path / name) for name, (_, write) in KINDS.items() if name in ("CLIPScore", "ImageReward")]
    images, prompts = torch.rand(4, 3, 20, 17, generator=tiny.seeded()), WORDS[:4]
    clip, blip = (kind.from_pretrained(folder) for kind, folder in zip((CLIPScore, ImageReward), folders, strict=True))
    alone = Sum(Standardize.fitted(clip, images, prompts), Negate(blip), weights=[1, 0.5])
    expected = [alone(*one) for one in given]
    (clip, first), (blip, second) = (
        counting(kind(folder)) for kind, folder in zip((CLIPScore, ImageReward), folders, strict=True)
    )
    fitted = in_threads(Standardize.fitted, [(clip, images, prompts)] * THREADS)
    for one in fitted:
        assert (one.mean, one.std) == pytest.approx((next(iter(alone.rewards.values())).mean, fitted[0].std), rel=1e-5)
    found = in_threads(Sum(fitted[-1], Negate(blip), weights=[1, 0.5]), given)
    assert (len(first), len(second)) == (1, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_reward_may_be_moved_while_it_scores(tmp_path):
    """A dtype is that of a whole score: no thread takes the networks from under another."""
    reward = CLIPScore.from_pretrained(checkpoints.clip(tmp_path))
    image = torch.rand(1, 3, 20, 17, generator=tiny.seeded())
    dtypes = (torch.bfloat16, torch.float32)
    exact = {dtype: float(reward.to(dtype=dtype)(image, "a circle")) for dtype in dtypes}

    def score(i):
        if i % 4 == 0:
            reward.to(dtype=dtypes[i // 4 % 2])
        return float(reward(image, "a circle"))

    found = in_threads(score, [(i,) for i in range(16)])
    assert all(min(abs(score - one) for one in exact.values()) < 1e-4 for score in found)


def test_models_are_read_one_after_another(tmp_path):
    """Because reading sets torch's default dtype, which is the whole process's."""
    folder, now, most = checkpoints.clip(tmp_path), [], []
    rewards = [CLIPScore(folder) for _ in range(4)]
    for reward in rewards:
        read = reward._read

        def watched(read=read):
            now.append(1)
            most.append(len(now))
            time.sleep(0.02)
            networks = read()
            now.pop()
            return networks

        reward._read = watched
    in_threads(lambda reward: reward.load(), [(reward,) for reward in rewards])
    assert most == [1] * 4


def test_rewards_are_copied_and_pickled(tmp_path):
    image = torch.rand(1, 3, 20, 17, generator=tiny.seeded())
    for reward in (CLIPScore(checkpoints.clip(tmp_path)), CLIPScore.from_pretrained(tmp_path)):
        expected = CLIPScore(tmp_path)(image, "a circle")
        for one in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward)), copy.deepcopy(Sum(reward))):
            torch.testing.assert_close(one(image, "a circle"), expected, rtol=1e-5, atol=1e-6)


# ---- before the run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_load_reads_the_model_once(name, tmp_path):
    kind, write = KINDS[name]
    reward, reads = counting(kind(write(tmp_path)))
    assert reward.networks is None
    assert reward.load() is reward
    assert reward.load().networks is not None
    reward(torch.rand(1, 3, 20, 17, generator=tiny.seeded()), ["a circle"])
    assert len(reads) == 1


def test_compositions_load_what_they_are_made_of(tmp_path):
    folder = checkpoints.clip(tmp_path)
    (first, once), (second, twice) = counting(CLIPScore(folder)), counting(PickScore(folder))
    reward = Sum(Product(Negate(first), lambda images, prompts: [1.0]), Standardize(second, mean=0, std=1))
    assert reward.load() is reward
    assert reward.load() is reward
    assert (len(once), len(twice)) == (1, 1)
    assert first.networks is not None
    assert second.networks is not None


def test_load_tells_what_cannot_be_read(tmp_path):
    with pytest.raises(OSError, match="CLIPScore could not be read from"):
        Negate(CLIPScore(tmp_path / "nothing")).load()


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("path", ["{}/typo", "{}/typo/deeper", "./typo", "../typo", "~/typo-of-mine", "typo.pt"])
def test_paths_that_are_not_there(name, path, tmp_path, monkeypatch):
    """No name on the Hub is like them, so nothing is asked of the Hub, nor to be downloaded."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = path.format(tmp_path)
    reward = KINDS[name][0](path)
    with pytest.raises(OSError, match="could not be read from .*: there is no file or folder ") as caught:
        reward.load()
    where = path.replace("~", str(tmp_path))
    assert f"there is no file or folder {where}\nIt needs " in str(caught.value)
    assert f"hf download {where}" not in str(caught.value)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize(
    ("kind", "option"),
    [(CLIPScore, "processor"), (HPSv2, "processor"), (AestheticScore, "clip"), (ImageReward, "tokenizer")],
    ids=["CLIPScore", "HPSv2", "AestheticScore", "ImageReward"],
)
def test_options_that_are_not_there(kind, option, tmp_path):
    folder = KINDS[kind.__name__][1](tmp_path / "there")
    with pytest.raises(OSError, match=f"there is no file or folder {tmp_path}/typo\nIt needs"):
        kind(folder, **{option: tmp_path / "typo"}).load()


def test_names_that_may_be_on_the_hub():
    for name in ("nobody/nothing", "nothing-at-all", "nobody/nothing-v1.5_b"):
        with pytest.raises(OSError, match=f"There is no folder {name} here; where .* hf download {name}\n"):
            CLIPScore(name).load()


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = checkpoints.clip(tmp_path / "clip")
    for reward in (CLIPScore("~/clip"), CLIPScore(Path("~/clip"), processor="~/clip")):
        assert (reward.name, reward.processor) == (str(folder), str(folder))
        reward.load()


# ---- checkpoints that are none ---------------------------------------------------------------------------------------


def quickly(kind, folder, message):
    began = time.monotonic()
    with pytest.raises(OSError, match=rf"{kind.__name__} could not be read[\s\S]*{message}") as caught:
        kind(folder).load()
    assert isinstance(caught.value.__cause__, ValueError)
    assert time.monotonic() - began < 10


FILES = {HPSv2: HPSv2.checkpoint, AestheticScore: "aesthetic-model.pth", ImageReward: "ImageReward.pt"}
ADDED = {HPSv2: "transformer.resblocks.{}.ln_1.weight", ImageReward: "blip.text_encoder.encoder.layer.{}.x.weight"}


@pytest.mark.parametrize("kind", ADDED, ids=[kind.__name__ for kind in ADDED])
@pytest.mark.parametrize("number", ["1000000000", "-1", "01", "a"])
def test_layers_are_numbered_without_gaps(kind, number, tmp_path):
    """A model of 10⁹ layers would never be built."""
    file = KINDS[kind.__name__][1](tmp_path) / FILES[kind]
    held = torch.load(file, weights_only=True)
    held.get("state_dict", held)[ADDED[kind].format(number)] = torch.zeros(1)
    torch.save(held, file)
    quickly(kind, tmp_path, f"expected layers numbered 0, 1, 2, … without gaps, got .* among them {number}: name")


def test_numbers_of_layers():
    state = {f"block.{i}.{kind}": torch.zeros(1) for i in range(12) for kind in ("weight", "bias")}
    assert num_layers(state, "block.") == 12
    with pytest.raises(ValueError, match="got 0, among them none"):
        num_layers(state, "layer.")
    del state["block.3.weight"], state["block.3.bias"]
    with pytest.raises(ValueError, match="got 11, among them 11"):
        num_layers(state, "block.")


@pytest.mark.parametrize("kind", FILES, ids=[kind.__name__ for kind in FILES])
@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([1, 2], "expected a dict of tensors by their names, got list"),
        (torch.zeros(3), "expected a dict of tensors by their names, got Tensor"),
        ({"state_dict": torch.zeros(3)}, "expected a dict of tensors by their names, got Tensor"),
        ({}, "expected a dict of tensors by their names, got none of 0 entries"),
        ({"epoch": 3, 4: torch.zeros(1)}, "expected a dict of tensors by their names, got none of 2 entries"),
        ({"state_dict": {"a": torch.zeros(1).expand(10**6, 10**4)}}, "got a of shape .1000000, 10000., which repeats"),
    ],
    ids=["list", "tensor", "tensor inside", "empty", "no tensors", "repeated"],
)
def test_checkpoints_that_are_no_dicts_of_tensors(kind, held, message, tmp_path):
    torch.save(held, KINDS[kind.__name__][1](tmp_path) / FILES[kind])
    quickly(kind, tmp_path, message)


def test_checkpoints_that_are_dicts_of_tensors(tmp_path):
    state = OrderedDict(a=torch.rand(2, 3), b=torch.rand(3, 2).T)
    for held in (state, {"epoch": 1, "state_dict": state}, {**state, "epoch": 1}):
        torch.save(held, tmp_path / "checkpoint.pt")
        torch.testing.assert_close(state_of(tmp_path / "checkpoint.pt"), dict(state), rtol=0, atol=0)


def test_heads_without_layers():
    """Of none the score would be the embedding."""
    with pytest.raises(ValueError, match=r"expected tensors layers.0.weight, .*, got \['linear.weight'\]"):
        linear_head({"linear.weight": torch.zeros(1, 3)})


@pytest.mark.parametrize("value", [torch.zeros(0, 32), torch.zeros(3), torch.tensor(1.0)], ids=["empty", "1-D", "0-D"])
def test_tensors_of_other_shapes_are_told(value, tmp_path):
    file = checkpoints.hpsv2(tmp_path) / HPSv2.checkpoint
    held = torch.load(file, weights_only=True)
    held["state_dict"]["visual.positional_embedding"] = value
    torch.save(held, file)
    with pytest.raises(OSError, match="HPSv2 could not be read"):
        HPSv2(tmp_path).load()
