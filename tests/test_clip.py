"""CLIPScore and PickScore, against CLIP itself."""

import numpy as np
import torch
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor

import checkpoints
import tiny
from glassflows.rewards import CLIPScore
from scenes import CLIP
from scenes.draw import draw
from scenes.grammar import parse
from toy_rewards import PROMPTS, WARNINGS, images, load, pixels, square

pytestmark = WARNINGS


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


def test_the_logit_scale_is_not_rounded(folders):
    dtypes = (torch.float32, torch.bfloat16)
    exact, half = (load("PickScore", folders, dtype=dtype).networks["clip"] for dtype in dtypes)
    assert torch.equal(exact.logit_scale, half.logit_scale)
