import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from glassflows.rewards import CLIPScore, as_reward
from scenes import CLIP
from scenes.draw import draw
from scenes.grammar import parse


def test_score_is_the_models_own_logit():
    """Against CLIPModel and its own processor, image by image, at the model's size."""
    images = (torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    prompts = ["a red circle", "two blue squares", "a red circle", "three green triangles", "a red circle"]
    model, processor = CLIPModel.from_pretrained(CLIP, dtype=torch.float32), CLIPProcessor.from_pretrained(CLIP)
    pixels = processor.image_processor((images * 255).byte(), return_tensors="pt")["pixel_values"]
    tokens = processor.tokenizer(prompts, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        expected = model(pixel_values=pixels, **tokens).logits_per_image.diagonal()
    torch.testing.assert_close(CLIPScore(CLIP)(images, prompts), expected, rtol=0, atol=1e-3)


def test_other_sizes_are_resized_and_cropped():
    prompts = ["a red circle", "two blue squares"]
    rng = np.random.default_rng(0)
    images = torch.from_numpy(np.stack([draw(parse(prompt), rng) for prompt in prompts]))
    reward = CLIPScore(CLIP)
    large = images.repeat_interleave(2, -1).repeat_interleave(2, -2)
    wide = torch.nn.functional.pad(large, (10, 10, 0, 0), mode="replicate")
    torch.testing.assert_close(reward(wide, prompts), reward(large, prompts), rtol=0, atol=0.1)
    assert (reward(large, prompts) - reward(images, prompts)).abs().max() < 1


def test_default_is_openais_large_model(monkeypatch):
    """The public weights cannot be had offline; what is asked for is."""
    asked = []

    def refuse(name, **kwargs):
        asked.append(name)
        raise OSError("offline")

    monkeypatch.setattr(CLIPModel, "from_pretrained", refuse)
    with pytest.raises(OSError, match="offline"):
        CLIPScore()
    assert asked == ["openai/clip-vit-large-patch14"]


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
