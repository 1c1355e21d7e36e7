"""OCRScore, against the models' own generation one picture at a time, and against its formula."""

import functools
import itertools
import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, VisionEncoderDecoderModel

import checkpoints
import ocr_checkpoints
from glassflows.rewards.ocr import QUESTION, OCRScore, edit_distance, legibility, quoted
from toy_rewards import WARNINGS
from toy_rewards import images as noises

pytestmark = WARNINGS
KINDS = {"trocr": ocr_checkpoints.trocr, "got": ocr_checkpoints.got, "vlm": checkpoints.vlm}
TOKENS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("ocr")
    return {name: write(root / name) for name, write in KINDS.items()}


def load(name, folders, **options):
    return OCRScore.from_pretrained(folders[name], **{"max_tokens": TOKENS, **options})


def images(number=5):
    """Return images of several kinds, so that the models of random weights read several things."""
    shown = noises(number)
    shown[1::4] *= 0.1
    shown[2::4] = 1 - 0.1 * shown[2::4]
    shown[3::4, 0] = 0
    return (shown * 255).round() / 255


def picture(image):
    return Image.fromarray((image * 255).round().byte().movedim(0, -1).numpy())


def read_alone(name, folder, image):
    """Return what a model reads in a picture, as its documentation says."""
    processor, kind = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText
    options = {"do_sample": False, "max_new_tokens": TOKENS}
    if name == "trocr":
        pixels = processor(picture(image), return_tensors="pt").pixel_values
        written = VisionEncoderDecoderModel.from_pretrained(folder).generate(pixels, **options)
        return processor.batch_decode(written, skip_special_tokens=True)[0]
    if name == "got":
        inputs = processor(picture(image), return_tensors="pt")
        options |= {"tokenizer": processor.tokenizer, "stop_strings": "<|im_end|>"}
    else:
        asked = f"USER : <image> {QUESTION} ASSISTANT :"
        inputs = processor(images=picture(image), text=asked, return_tensors="pt")
        inputs.pop("token_type_ids", None)  # LLaMA has none
    written = kind.from_pretrained(folder).generate(**inputs, **options)
    return processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_what_is_read_is_what_the_model_writes_alone(name, folders):
    """Of three pictures at a time, and of pictures of several sizes."""
    reward, shown = load(name, folders), images()
    alone = [read_alone(name, folders[name], image).strip() for image in shown]
    assert len(set(alone)) > 1
    reward.batch_size = 3
    assert reward.read(shown) == alone
    assert reward.read([picture(image) for image in shown]) == alone
    other = Image.new("L", (50, 20), 200)
    assert reward.read([*map(picture, shown[:2]), other])[:2] == alone[:2]


@pytest.mark.parametrize("name", KINDS)
def test_scores_are_those_of_what_is_read(name, folders):
    reward, shown = load(name, folders), images()
    read = reward.read(shown)
    targets = [read[0], f"{read[1]}x", "never", read[3][:3], "Q" + read[4][1:]]
    scores = reward(shown, [f'a sign "{target}"' for target in targets])
    assert scores.dtype == torch.float32
    expected = torch.tensor([legibility(one, target) for one, target in zip(read, targets, strict=True)])
    assert torch.equal(scores, expected)
    assert scores[0] == scores[3] == 1
    assert 0 < scores[1] < 1


def test_videos_have_the_mean_of_their_frames(folders):
    reward, shown = load("trocr", folders), images(4)
    prompts = [f'"{reward.read(shown[:1])[0]}"', '"x"']
    frames = reward(shown, [prompts[0]] * 2 + [prompts[1]] * 2)
    torch.testing.assert_close(reward(shown.unflatten(0, (2, 2)), prompts), frames.view(2, 2).mean(1))
    assert frames[0] == 1


def test_the_text_may_be_a_function_of_the_prompt(folders):
    reward = load("trocr", folders)
    [read] = reward.read(images(1))
    named = load("trocr", folders, text={"a sign": read, "a wall": f"{read} no"}.__getitem__)
    assert named(images(1), "a sign") == 1
    assert named(images(1), "a wall") == pytest.approx(legibility(read, f"{read} no"))
    with pytest.raises(ValueError, match="expected the text that is to be read"):
        load("trocr", folders, text=lambda prompt: " ")(images(1), "a sign")


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_drawn_whatever_the_models_settings(name, folders):
    reward = load(name, folders)
    read, state = reward.read(images()), torch.get_rng_state()
    settings = reward.networks["reader"].generation_config
    settings.do_sample, settings.temperature, settings.top_k, settings.num_beams = True, 2.0, 5, 2
    assert reward.read(images()) == read
    assert torch.equal(torch.get_rng_state(), state)


def test_reading_ends(folders):
    """At the end that GOT-OCR writes, of each picture by itself, and at the number of tokens."""
    reward, short, shown = load("got", folders), load("got", folders, max_tokens=2), images()
    read, steps = reward.read(shown), itertools.count()
    end = reward.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def ends_the_first(module, args, logits):
        if next(steps) == 2:
            logits[0, -1, end] = 1e4
        return logits

    reward.networks["reader"].get_output_embeddings().register_forward_hook(ends_the_first)
    assert reward.read(shown) == [short.read(shown)[0], *read[1:]]
    assert len(short.read(shown)[0]) <= 2 < len(read[0])


def test_a_template_that_begins_the_text_itself(folders):
    """The text then begins once, not twice."""
    reward, seen = load("vlm", folders), []
    reward.networks["reader"].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    read = reward.read(images())
    asked = seen[0]
    reward.processor.chat_template = "<s>" + reward.processor.chat_template
    assert reward.read(images()) == read
    assert sum(torch.equal(ids, asked) for ids in seen) == 2
    assert (asked == 2).sum(1).tolist() == [1] * 5


@pytest.mark.parametrize("name", KINDS)
def test_precisions(name, folders):
    half = load(name, folders, dtype=torch.bfloat16)
    assert half(images(2).bfloat16(), ['"a"'] * 2).dtype == torch.float32
    double = load(name, folders, dtype=torch.float64)
    assert double(images(2), ['"a"'] * 2).dtype == torch.float64


# ---- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "target", "score"),
    [
        ("OPEN", "OPEN", 1),
        ("open", "Open", 1),
        ("O P\nE N", "open", 1),
        ("24 hours", "24Hours", 1),
        ("we are open today", "Open", 1),
        ("0pen", "open", 0.75),
        ("ope", "open", 0.75),
        ("opens 0n", "open on", 1 - 2 / 6),
        ("", "open", 0),
        ("closed for the winter", "open", 0),
        ("nepo", "open", 0),
        ("GLASS FLOW", "glass flows", 0.9),
    ],
)
def test_legibility(read, target, score):
    assert legibility(read, target) == pytest.approx(score, abs=1e-12)


def test_edit_distance_is_the_shortest_way():
    """Of all pairs of words of up to four letters, against the recursion that defines it."""

    @functools.cache
    def distance(one, other):
        if not one or not other:
            return len(one) + len(other)
        if one[0] == other[0]:
            return distance(one[1:], other[1:])
        return 1 + min(distance(one[1:], other), distance(one, other[1:]), distance(one[1:], other[1:]))

    words = ["".join(word) for length in range(5) for word in itertools.product("abc", repeat=length)]
    sample = words[::3]
    assert all(edit_distance(one, other) == distance(one, other) for one in sample for other in words)
    assert edit_distance("intention", "execution") == 5


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "OPEN"', "OPEN"),
        ("a sign that says “OPEN”", "OPEN"),
        ("une enseigne «OUVERT»", "OUVERT"),
        ("ein Schild „OFFEN“ an der Tür", "OFFEN"),
        ("szyld „OTWARTE”", "OTWARTE"),
        ('"STOP" above “ahead” and „bald“', "STOP ahead bald"),
        ('a shop "OPEN" next to a shop "CLOSED"', "OPEN CLOSED"),
        ("a dog's sign that says OPEN", ""),
        ('a 6" pipe', ""),
        ('an empty sign ""', ""),
        ('two lines, "one\ntwo"', "one\ntwo"),
    ],
)
def test_quotes(prompt, text):
    assert quoted(prompt) == text


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["a sign that says OPEN", 'a sign " "', ""])
def test_prompts_without_a_text(prompt, folders):
    with pytest.raises(ValueError, match=r'in quotes, got .*: write a sign that says "OPEN", or .* OCRScore\(text=…\)'):
        load("trocr", folders)(images(1), [prompt])


def test_images_with_a_gradient(folders):
    reward = load("trocr", folders)
    for call in (reward.read, lambda shown: reward(shown, ['"a"'])):
        with pytest.raises(ValueError, match="images require a gradient; OCRScore has none: detach them"):
            call(images(1).requires_grad_())


def test_images_and_prompts_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="max_tokens: expected a positive number, got 0"):
        OCRScore(max_tokens=0)
    reward = OCRScore(tmp_path)
    with pytest.raises(ValueError, match=r"images: expected shape \(N, 3, H, W\)"):
        reward.read(torch.rand(3, 8, 9))
    with pytest.raises(ValueError, match="OCRScore scores images under their prompts, got None"):
        reward(images(1), [None])
    with pytest.raises(OSError, match="OCRScore could not be read from"):
        reward.read(images(1))


def test_models_that_cannot_be_asked(tmp_path):
    folder = checkpoints.blip2(tmp_path / "blip2", "opt")
    with pytest.raises(
        OSError, match="kind blip-2 is asked in the words of a chat template, and its processor has none"
    ):
        OCRScore.from_pretrained(folder)
    parts = {"encoder": {"model_type": "donut-swin"}, "decoder": {"model_type": "mbart"}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vision-encoder-decoder", **parts}))
    with pytest.raises(OSError, match="Donut and Nougat begin with a task"):
        OCRScore.from_pretrained(tmp_path)
