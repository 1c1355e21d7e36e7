"""AestheticScore, against the published head."""

import torch
from transformers import CLIPModel

from published import Head
from toy_rewards import WARNINGS, load, pixels, square

pytestmark = WARNINGS


def test_aesthetic_score_is_the_published_head(folders):
    model, head = CLIPModel.from_pretrained(folders["AestheticScore"]), Head(12).eval()
    head.load_state_dict(torch.load(folders["AestheticScore"] / "aesthetic-model.pth", weights_only=True))
    tokens = torch.tensor([[52, 53]] * 3)
    with torch.no_grad():
        expected = head(model(pixel_values=pixels(square()), input_ids=tokens).image_embeds)
    torch.testing.assert_close(load("AestheticScore", folders)(square()), expected, rtol=0, atol=1e-5)
    assert expected.std() > 1e-5
