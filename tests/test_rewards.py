"""Every reward against an independent computation, from checkpoints of toy size in the published formats."""

import copy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertTokenizer, CLIPImageProcessor, CLIPModel, CLIPProcessor

import checkpoints
import tiny
from glassflows import FeynmanKacSteerer
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
    as_reward,
)
from glassflows.rewards.images import cropped, padded
from published import Head, OpenCLIP, PublishedImageReward
from scenes import CALL, CLIP, load_pipeline
from scenes.draw import draw
from scenes.grammar import parse

PROMPTS = ["a red circle", "two squares", "a red circle"]
KINDS = {
    "CLIPScore": (CLIPScore, checkpoints.clip),
    "PickScore": (PickScore, checkpoints.clip),
    "HPSv2": (HPSv2, checkpoints.hpsv2),
    "AestheticScore": (AestheticScore, checkpoints.aesthetic),
    "ImageReward": (ImageReward, checkpoints.image_reward),
    "VLMReward": (VLMReward, checkpoints.vlm),
}
CLIPS = ("CLIPScore", "PickScore", "HPSv2")  # whose text mask transformers 4 cannot make in float64
FLOAT64 = [name for name in KINDS if name not in CLIPS or Version(transformers.__version__) >= Version("5")]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*slow image processor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder with a checkpoint of toy size for each reward."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: write(root / name) for name, (_, write) in KINDS.items()}


def load(name, folders, **options):
    return KINDS[name][0].from_pretrained(folders[name], **options)


def images(number=3, height=20, width=30, seed=0):
    return (torch.rand(number, 3, height, width, generator=tiny.seeded(seed)) * 255).round() / 255


def square(number=3, seed=0):
    """Return images of the size that the networks see."""
    return images(number, checkpoints.SIZE, checkpoints.SIZE, seed)


def pixels(images, mean=checkpoints.MEAN, std=checkpoints.STD):
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))
    return (images - mean) / std


# ---- what is scored --------------------------------------------------------------------------------------------------


@tiny.TRANSFORMERS_5
def test_clip_score_is_a_hundred_cosines():
    """Of the scenes CLIP, against its own processor, at the model's size."""
    pictures = images(5, 32, 32)
    prompts = ["a red circle", "two blue squares", "a red circle", "three green triangles", "a red circle"]
    model, processor = CLIPModel.from_pretrained(CLIP).float(), CLIPProcessor.from_pretrained(CLIP)
    tokens = processor.tokenizer(prompts, padding="max_length", return_tensors="pt")
    seen = processor.image_processor((pictures * 255).byte(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=seen, **tokens).logits_per_image.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(CLIPScore(CLIP)(pictures, prompts), 100 * expected.clamp(min=0), rtol=0, atol=1e-3)


@tiny.TRANSFORMERS_5
def test_other_sizes_are_resized_and_cropped():
    prompts = ["a red circle", "two blue squares"]
    rng = np.random.default_rng(0)
    pictures = torch.from_numpy(np.stack([draw(parse(prompt), rng) for prompt in prompts]))
    reward = CLIPScore(CLIP)
    large = pictures.repeat_interleave(2, -1).repeat_interleave(2, -2)
    wide = torch.nn.functional.pad(large, (10, 10, 0, 0), mode="replicate")
    torch.testing.assert_close(reward(wide, prompts), reward(large, prompts), rtol=0, atol=0.3)
    assert (reward(large, prompts) - reward(pictures, prompts)).abs().max() < 3


def test_pick_score_is_the_models_logit(folders):
    model, tokenizer = (
        CLIPModel.from_pretrained(folders["PickScore"]),
        AutoTokenizer.from_pretrained(folders["PickScore"]),
    )
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        seen = pixels(square(), checkpoints.OWN_MEAN, checkpoints.OWN_STD)
        expected = model(pixel_values=seen, **tokens).logits_per_image.diagonal()
    torch.testing.assert_close(load("PickScore", folders)(square(), PROMPTS), expected, rtol=0, atol=1e-5)


def test_hpsv2_is_the_published_architecture(folders):
    """The names and shapes of open_clip, and images padded rather than cropped."""
    published = OpenCLIP()
    state = torch.load(folders["HPSv2"] / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    published.load_state_dict({name: value.float() for name, value in state.items()})
    pictures = images(3, 16, 10)
    seen = pixels(torch.nn.functional.pad(pictures, (3, 3)))
    ids = AutoTokenizer.from_pretrained(folders["HPSv2"])(PROMPTS, padding=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = published.cosine(seen, ids)
    torch.testing.assert_close(load("HPSv2", folders)(pictures, PROMPTS), expected, rtol=0, atol=1e-5)
    swapped = copy.deepcopy(published)
    for block in swapped.transformer.resblocks:  # the oracle tells the projections of queries and keys apart
        weight = block.attn.in_proj_weight.data
        weight.copy_(torch.cat([weight[32:64], weight[:32], weight[64:]]))
    with torch.no_grad():
        assert (swapped.cosine(seen, ids) - expected).abs().max() > 1e-3


def test_the_logit_scale_is_not_rounded(folders):
    dtypes = (torch.float32, torch.bfloat16)
    exact, half = (load("PickScore", folders, dtype=dtype).networks["clip"] for dtype in dtypes)
    assert torch.equal(exact.logit_scale, half.logit_scale)


def test_hpsv2_reads_models_of_transformers_and_files(folders, tmp_path):
    reward = HPSv2.from_pretrained(folders["CLIPScore"])  # version 2.0 is a CLIPModel
    assert reward(images(), PROMPTS).abs().max() <= 1
    file = folders["HPSv2"] / "HPS_v2.1_compressed.pt"
    alone = HPSv2.from_pretrained(file, processor=folders["HPSv2"])
    assert torch.equal(alone(images(), PROMPTS), load("HPSv2", folders)(images(), PROMPTS))


def test_aesthetic_score_is_the_published_head(folders):
    model, head = CLIPModel.from_pretrained(folders["AestheticScore"]), Head(12).eval()
    head.load_state_dict(torch.load(folders["AestheticScore"] / "aesthetic-model.pth", weights_only=True))
    tokens = torch.tensor([[52, 53]] * 3)
    with torch.no_grad():
        expected = head(model(pixel_values=pixels(square()), input_ids=tokens).image_embeds)
    torch.testing.assert_close(load("AestheticScore", folders)(square()), expected, rtol=0, atol=1e-5)
    assert expected.std() > 1e-5


def test_image_reward_is_the_published_architecture(folders):
    """Prompts of two lengths, so that the padding tells; of a margin of three pixels two are cut on the left."""
    published = PublishedImageReward().eval()
    published.load_state_dict(torch.load(folders["ImageReward"] / "ImageReward.pt", weights_only=True))
    tokenizer = BertTokenizer.from_pretrained(folders["ImageReward"])
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    wide = images(3, 16, 19)
    with torch.no_grad():
        seen = pixels(wide[..., 2:18])
        expected = published(seen, tokens["input_ids"], tokens["attention_mask"])
        unmasked = published(seen, tokens["input_ids"], torch.ones_like(tokens["attention_mask"]))
    reward = load("ImageReward", folders)
    torch.testing.assert_close(reward(wide, PROMPTS), expected, rtol=0, atol=1e-5)
    assert reward.networks["vision"].config.layer_norm_eps == 1e-6  # too small to tell at this size
    assert reward.networks["text"].config.layer_norm_eps == 1e-12
    assert (unmasked - expected).abs().max() > 1e-3


def test_vlm_reward_is_the_probability_of_yes(folders):
    """One image and question at a time, without padding."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folders["VLMReward"])
    processor = AutoProcessor.from_pretrained(folders["VLMReward"])
    yes = processor.tokenizer.convert_tokens_to_ids("Yes")
    expected = []
    for image, prompt in zip(images(), PROMPTS, strict=True):
        picture = Image.fromarray((image * 255).byte().movedim(0, -1).numpy())
        asked = f'USER : <image> Does this image show "{prompt}"? Answer Yes or No. ASSISTANT :'
        with torch.no_grad():
            logits = model(**processor(images=picture, text=asked, return_tensors="pt")).logits[0, -1]
        expected.append(logits.softmax(-1)[yes])
    reward = load("VLMReward", folders)
    torch.testing.assert_close(reward(images(), PROMPTS), torch.stack(expected), rtol=0, atol=1e-6)
    fixed = load("VLMReward", folders, question="Does this image show a red circle?", answer="No")
    assert fixed(images()).shape == (3,)
    for answer in ("Definitely", ""):
        with pytest.raises(ValueError, match=f"has no token with which '{answer}' begins"):
            load("VLMReward", folders, answer=answer)(images(), PROMPTS)
    with pytest.raises(ValueError, match="prompts: <image> stands for an image"):
        reward(images(), ["an <image> of a circle", *PROMPTS[1:]])
    with pytest.raises(ValueError, match="VLMReward has none: detach them"):
        reward(images().requires_grad_(), PROMPTS)


@pytest.mark.parametrize(("height", "width"), [(40, 61), (57, 40), (13, 9), (16, 16), (128, 170)])
@pytest.mark.parametrize("kind", ["noise", "edges", "smooth"])
def test_images_are_prepared_as_by_the_processor(folders, height, width, kind):
    """To 1.5/255, which is what PIL rounds away in its two passes."""
    if kind == "smooth":
        made = torch.nn.functional.interpolate(images(2, 8, 9), (height, width), mode="bicubic").clamp(0, 1)
    elif kind == "noise":
        made = images(2, height, width)
    else:
        rows, columns = torch.arange(height)[:, None] // 7, torch.arange(width) // 7
        made = ((rows + columns) % 2).float().expand(2, 3, -1, -1)
    pictures = [Image.fromarray((image * 255).round().byte().movedim(0, -1).numpy()) for image in made]
    processor = CLIPImageProcessor.from_pretrained(folders["CLIPScore"], do_normalize=False)
    expected = processor(pictures, return_tensors="pt")["pixel_values"]
    given = torch.stack([torch.from_numpy(np.array(picture)).movedim(-1, 0) / 255 for picture in pictures])
    torch.testing.assert_close(cropped(given, 16), expected, rtol=0, atol=1.5 / 255)


def test_vlms_are_read_in_their_dtype(folders):
    """Not cast: rotary frequencies stay in float32, whatever the weights are."""
    vlm = load("VLMReward", folders, dtype=torch.bfloat16).networks
    assert next(vlm.parameters()).dtype == torch.bfloat16
    assert {buffer.dtype for name, buffer in vlm.named_buffers() if "inv_freq" in name} == {torch.float32}


def test_a_template_that_begins_the_text_itself(folders):
    """The text then begins once, not twice."""
    reward, seen = load("VLMReward", folders), []
    model = reward.networks["vlm"]
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    plain = reward(images(), PROMPTS)
    reward.processor.chat_template = "<s>" + reward.processor.chat_template
    assert torch.equal(reward(images(), PROMPTS), plain)
    assert torch.equal(*seen)
    assert (seen[0] == 2).sum(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_vlms_without_a_chat_template(language, tmp_path):
    """BLIP-2's processor puts the image in by itself; beside T5 the answer is a text of its own."""
    reward = VLMReward.from_pretrained(checkpoints.blip2(tmp_path, language))
    whole = reward(images(), PROMPTS)
    single = torch.cat([reward(image[None], [prompt]) for image, prompt in zip(images(), PROMPTS, strict=True)])
    torch.testing.assert_close(single, whole, rtol=1e-4, atol=1e-6)
    picture = Image.fromarray((images()[0] * 255).byte().movedim(0, -1).numpy())
    asked = f'Does this image show "{PROMPTS[0]}"? Answer Yes or No.'
    inputs = dict(reward.processor(images=picture, text=asked, return_tensors="pt"))
    if language == "t5":
        inputs["decoder_input_ids"] = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        logits = reward.networks["vlm"](**inputs).logits[0, -1]
    torch.testing.assert_close(whole[0], logits.softmax(-1)[checkpoints.WORDS.index("Yes")], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("end", ["Assistant:", "Assistant:\n"])
def test_the_answer_may_begin_with_a_space(folders, end):
    """As models with byte-level tokens write it after a colon."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(["User: q\nAssistant: Yes", "Yes it is. Yes No", "Assistant: No"] * 50, trainer)
    reward = load("VLMReward", folders)
    reward.processor.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    tokens = reward.processor.tokenizer.convert_ids_to_tokens(reward._first_tokens(f"User: q\n{end}"))
    assert set(tokens) == {"Yes", "ĠYes"}


@pytest.mark.parametrize(("height", "width"), [(40, 61), (57, 40), (13, 9)])
def test_padded_images_are_whole(height, width):
    seen = padded(torch.ones(1, 3, height, width), 16)
    assert seen.shape == (1, 3, 16, 16)
    long = max(height, width)
    rows, columns = (round(side * 16 / long) for side in (height, width))
    assert seen.sum() == pytest.approx(3 * rows * columns, rel=1e-5)
    assert seen[..., 8, 8].min() == pytest.approx(1)


# ---- what every reward does ------------------------------------------------------------------------------------------


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


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (images() * 2 - 1, r"expected values in \[0, 1\], got -1 to 1"),
        (images() * torch.nan, "expected values in .* got nan"),
        ((images() * 255).byte(), "expected floats in .* got torch.uint8: divide by 255"),
        (images().movedim(1, -1), r"expected shape \(N, 3, H, W\), got \(3, 20, 30, 3\)"),
        (images()[:0], "expected at least one, got none"),
        ([], "expected at least one, got none"),
        ([np.zeros((4, 4, 3))], "expected a tensor .* or PIL images, got a list of ndarray"),
    ],
)
def test_bad_images(folders, given, message):
    with pytest.raises(ValueError, match=message):
        load("AestheticScore", folders)(given)


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
    with pytest.raises(OSError, match=rf"{name} could not be read from [\s\S]*It needs ") as caught:
        reward(images(), PROMPTS)
    assert ADVICE[name] in str(caught.value)
    assert f"hf download {tmp_path}" not in str(caught.value)
    with pytest.raises(OSError, match=r"could not be read[\s\S]*hf download nobody/nothing-at-all"):
        KINDS[name][0].from_pretrained("nobody/nothing-at-all")


@pytest.mark.parametrize("name", ["CLIPScore", "PickScore", "HPSv2", "ImageReward"])
def test_tokenizers_of_nothing_are_refused(name, folders, tmp_path, monkeypatch):
    """transformers 5 makes them of folders without a vocabulary, and scores everything alike."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    bare = Path(shutil.copytree(folders[name], tmp_path / "bare"))
    for file in ("vocab.json", "merges.txt", "vocab.txt"):
        (bare / file).unlink(missing_ok=True)
    with pytest.raises(OSError, match=f"{name} could not be read"):
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
    for folder, message in ((pickled, "Weights only load failed|weights_only"), (other, "visual"), (cut, "")):
        with pytest.raises(OSError, match=rf"HPSv2 could not be read[\s\S]*({message})"):
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


# ---- rewards made of rewards and of functions ------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="Negate returned -0.* which has no power 0.5"):
        Product(Negate(red), weights=[0.5])(images())
    with pytest.raises(ValueError, match=r"rewards returned shapes \[\(3,\), \(3, 20, 30\)\]"):
        Sum(red, lambda images, prompts: images[:, 0])(images())
    with pytest.raises(ValueError, match="std: expected a positive number, got 0.0"):
        Standardize.fitted(red, torch.ones(3, 3, 4, 4))


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
    with pytest.raises(ValueError, match="takes: expected one of .*, got 'jax'"):
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
