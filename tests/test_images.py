"""Images on their way to a reward's network: resized, cropped, padded, or refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from glassflows.rewards.images import cropped, padded
from toy_rewards import WARNINGS, images, load

pytestmark = WARNINGS


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


@pytest.mark.parametrize(("height", "width"), [(40, 61), (57, 40), (13, 9)])
def test_padded_images_are_whole(height, width):
    seen = padded(torch.ones(1, 3, height, width), 16)
    assert seen.shape == (1, 3, 16, 16)
    long = max(height, width)
    rows, columns = (round(side * 16 / long) for side in (height, width))
    assert seen.sum() == pytest.approx(3 * rows * columns, rel=1e-5)
    assert seen[..., 8, 8].min() == pytest.approx(1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (images() * 2 - 1, r"expected values in \[0, 1\], got -1 to 1"),
        (images() * torch.nan, r"expected values in \[0, 1\], got nan to nan"),
        ((images() * 255).byte(), r"expected floats in \[0, 1\], got torch\.uint8: divide by 255"),
        (images().movedim(1, -1), r"expected shape \(N, 3, H, W\), got \(3, 20, 30, 3\)"),
        (images()[:0], "expected at least one, got none"),
        ([], "expected at least one, got none"),
        ([np.zeros((4, 4, 3))], r"expected a tensor \(N, 3, H, W\) or PIL images, got a list of ndarray"),
    ],
)
def test_bad_images(folders, given, message):
    with pytest.raises(ValueError, match=f"^images: {message}"):
        load("AestheticScore", folders)(given)
