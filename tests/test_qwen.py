"""The Qwen-VL family's images and texts, against transformers' image processor and texts written by hand."""

import json

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from tokenizers import Tokenizer
from torch.autograd import gradcheck
from transformers import AutoModelForImageTextToText
from transformers.utils import is_torchvision_available

import checkpoints
import qwen_checkpoints
import tiny
from glassflows.rewards import VLMReward
from glassflows.rewards.qwen import QwenProcessor, patches, smart_size
from toy_rewards import PROMPTS, WARNINGS, images, pixels

pytestmark = WARNINGS
TRANSFORMERS = Version(transformers.__version__)
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]


def picture(image):
    return Image.fromarray((image * 255).round().byte().movedim(0, -1).numpy())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A processor without a model."""
    folder = tmp_path_factory.mktemp("qwen")
    qwen_checkpoints.processor(folder, fewest=1, most=16)
    return folder


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((448, 448), (448, 448)),  # 16 tokens a side, 256 in all
        ((1024, 1024), (448, 448)),
        ((224, 896), (224, 896)),
        ((768, 1360), (336, 588)),  # 448 · √(768/1360) = 336.7, of which 12 · 28; 448 · √(1360/768) = 596.2
        ((300, 500), (364, 588)),  # stretched: 347.01 and 578.4, up to 13 and 21 tokens
        ((10, 2000), (56, 6356)),  # 31.7 and 6335.7
    ],
)
def test_sizes_of_256_tokens(size, expected):
    area = 256 * 28 * 28
    assert smart_size(*size, 28, area, area) == expected
    assert smart_size(*size[::-1], 28, area, area) == expected[::-1]


def test_sizes_are_those_of_transformers():
    module = transformers.models.qwen2_vl
    module = getattr(module, "image_processing_pil_qwen2_vl", None) or module.image_processing_qwen2_vl
    sides = torch.randint(32, 1500, (500, 2), generator=tiny.seeded()).tolist()
    for height, width in sides:
        for limits in ((28, 3136, 401408), (32, 65536, 65536)):
            assert smart_size(height, width, *limits) == module.smart_resize(height, width, *limits)


def test_images_of_one_line_are_refused():
    smart_size(5, 1000, 28, 3136, 3136)
    with pytest.raises(ValueError, match="images: expected sides of a ratio of at most 200, got 5 × 1001: crop them"):
        smart_size(5, 1001, 28, 3136, 3136)


@pytest.mark.parametrize("family", qwen_checkpoints.FAMILY)
def test_patches_are_in_the_order_of_transformers(family, tmp_path):
    side = qwen_checkpoints.SIDES[family]
    qwen_checkpoints.processor(tmp_path, family, fewest=1, most=16)
    seen = images(2, 4 * side, 6 * side)
    processor = QwenProcessor.from_pretrained(tmp_path).image_processor
    expected = processor(images=[picture(one) for one in seen], return_tensors="pt")
    assert expected["image_grid_thw"].tolist() == [[1, 4, 6]] * 2
    found = patches(pixels(seen), side, 2, 2)
    torch.testing.assert_close(found, expected["pixel_values"], rtol=0, atol=1e-5)
    assert (patches(pixels(seen), side, 1, 2) - found).abs().max() > 1  # row by row


def test_patches_have_gradients():
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64, generator=tiny.seeded(), requires_grad=True)
    assert gradcheck(lambda x: patches(x, 2, 2, 3), x)


# ---- the processor ---------------------------------------------------------------------------------------------------


def test_texts_have_a_place_for_each_token_of_an_image(folder):
    """Two images of 2 × 3 and 1 × 2 tokens, the second beside a longer text."""
    processor = QwenProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    pictures = [picture(one) for one in (images(1, 56, 84)[0], images(1, 28, 56)[0])]
    texts = ["Is it <|image_pad|>?", "Does this image show it, <|image_pad|>, or does it not show it?"]
    found = processor(text=texts, images=[[one] for one in pictures], padding=True, return_tensors="pt")
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    image = raw.token_to_id("<|image_pad|>")
    assert found["image_grid_thw"].tolist() == [[1, 4, 6], [1, 2, 4]]
    assert found["pixel_values"].shape == (24 + 8, 3 * 2 * 14 * 14)
    for row, text, number in zip(range(2), texts, (6, 2), strict=True):
        expected = raw.encode(text.replace("<|image_pad|>", "<|image_pad|>" * number)).ids
        kept = found["attention_mask"][row].bool()
        assert found["input_ids"][row][kept].tolist() == expected
        assert kept.tolist() == sorted(kept.tolist())  # padded on the left
        if "mm_token_type_ids" in found:
            assert torch.equal(found["mm_token_type_ids"][row], (found["input_ids"][row] == image).int())
    assert ("mm_token_type_ids" in found) == (Version("5.3") <= TRANSFORMERS)


@pytest.mark.parametrize("text", ["no image", "<|image_pad|> and <|image_pad|>"])
def test_texts_without_a_place_for_each_image(folder, text):
    with pytest.raises(ValueError, match=r"text: expected <\|image_pad\|> once for each image, 1, got [02]: write"):
        QwenProcessor.from_pretrained(folder)(text=[text], images=[[picture(images(1)[0])]])


@pytest.mark.parametrize("place", ["chat_template.json", "chat_template.jinja", "tokenizer_config.json"])
def test_chat_templates_wherever_they_are(place, tmp_path):
    qwen_checkpoints.processor(tmp_path)
    (tmp_path / "chat_template.json").unlink()
    template = qwen_checkpoints.TEMPLATE.replace("helpful", "new")
    if place == "chat_template.jinja":
        (tmp_path / place).write_text(template)
    else:
        held = json.loads((tmp_path / place).read_text()) if (tmp_path / place).exists() else {}
        (tmp_path / place).write_text(json.dumps(held | {"chat_template": template}))
    processor = QwenProcessor.from_pretrained(tmp_path)
    assert processor.chat_template == template
    assert processor.apply_chat_template(MESSAGES, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a new assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert processor.apply_chat_template(MESSAGES).endswith("this?<|im_end|>\n")


# ---- VLMReward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", qwen_checkpoints.FAMILY)
def test_vlm_reward_is_the_probability_of_yes(family, tmp_path):
    """One image and question at a time, written by hand; prompts of two lengths, so that the padding tells."""
    if not hasattr(transformers.models, family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    reward = VLMReward.from_pretrained(qwen_checkpoints.vlm(tmp_path, family))
    if Version("5") <= TRANSFORMERS and not is_torchvision_available():
        assert isinstance(reward.processor, QwenProcessor)
    side = qwen_checkpoints.SIDES[family]
    seen = images(3, 4 * side, 6 * side)
    found = reward(seen, PROMPTS)
    single = torch.cat([reward(image[None], [prompt]) for image, prompt in zip(seen, PROMPTS, strict=True)])
    torch.testing.assert_close(single, found, rtol=1e-4, atol=0)

    model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    processor = QwenProcessor.from_pretrained(tmp_path).image_processor
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    expected, flat = [], []
    for image, prompt in zip(seen, PROMPTS, strict=True):
        asked = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * 6}<|vision_end|>"
            f'Does this image show "{prompt}"? Answer Yes or No.<|im_end|>\n<|im_start|>assistant\n'
        )
        ids = torch.tensor([raw.encode(asked).ids])
        kinds = (ids == raw.token_to_id("<|image_pad|>")).int()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs |= processor(images=[picture(image)], return_tensors="pt")
        if Version("5.3") <= TRANSFORMERS:
            inputs["mm_token_type_ids"] = kinds
        yes = {raw.encode(asked + answer).ids[ids.shape[1]] for answer in ("Yes", " Yes")}
        with torch.no_grad():
            expected.append(model(**inputs).logits[0, -1].softmax(-1)[list(yes)].sum())
            inputs["position_ids"] = torch.arange(ids.shape[1]).expand(3, 1, -1)  # those of a text
            flat.append(model(**inputs).logits[0, -1].softmax(-1)[list(yes)].sum())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=0)
    assert (found / torch.stack(flat)).log().abs().max() > 0.01
    with pytest.raises(ValueError, match=r"prompts: <\|im_end\|> is a control token of"):
        reward(seen[:1], ["a circle<|im_end|>"])
    with pytest.raises(ValueError, match=r"prompts: <\|image_pad\|> stands for an image to"):
        reward(seen[:1], ["<|image_pad|>"])


def test_other_models_say_what_their_processors_lack(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError("it needs sentencepiece")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", missing)
    with pytest.raises(OSError, match="it needs sentencepiece"):
        VLMReward.from_pretrained(checkpoints.vlm(tmp_path))
