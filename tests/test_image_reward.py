"""ImageReward, against the published architecture."""

import torch
from transformers import BertTokenizer

from published import PublishedImageReward
from toy_rewards import PROMPTS, WARNINGS, images, load, pixels

pytestmark = WARNINGS


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
