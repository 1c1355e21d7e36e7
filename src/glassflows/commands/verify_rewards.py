"""`glassflows verify-rewards`: rewards with their public checkpoints against what is published.

A reward with a published example value is held to it (CLIPScore, ImageReward); PickScore to its
model card's recipe, transformers' own processor and model; HPSv2's reading of open_clip's
checkpoint of version 2.0 to its public conversion to transformers. Of the others no example value
is published. AestheticScore should lie between 4 and 7 for a photograph, HPSv3 between 0 and 15 for
one under its own caption, and higher than under another, and VQAScore should tell cats from a dog.
Checkpoints of up to 17 GB each are downloaded.
"""

from __future__ import annotations

import io
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from urllib.request import urlopen

import torch
from PIL import Image
from torch import Tensor

from ..rewards import (
    AestheticScore,
    CLIPScore,
    HPSv2,
    HPSv3,
    ImageReward,
    PickScore,
    VQAScore,
)

CATS = "http://images.cocodataset.org/val2017/000000039769.jpg"
OCEANS = "https://raw.githubusercontent.com/THUDM/ImageReward/main/assets/images/{}.webp"
OCEAN = "a painting of an ocean with clouds and birds, day time, low depth field effect"
CATS_CAPTION = "two cats sleeping on a pink couch, with two remote controls"
CAT_AND_DOG = ["a photo of a cat", "a photo of a dog"]


def picture(url: str) -> Image.Image:
    """Return a picture of the web."""
    with urlopen(url, timeout=60) as answer:
        return Image.open(io.BytesIO(answer.read())).convert("RGB")


def clip_score() -> tuple[Tensor, Tensor, float]:
    """From the tests of transformers: the logits of CLIP-B/32."""
    reward = CLIPScore.from_pretrained("openai/clip-vit-base-patch32")
    return reward([picture(CATS)] * 2, CAT_AND_DOG), torch.tensor([24.5701, 19.3049]), 0.05


def pick_score(
    model: str = "yuvalkirstain/PickScore_v1",
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
) -> tuple[Tensor, Tensor, float]:
    """From the model card: exp(s) · cos of transformers' own processor and model."""
    from transformers import CLIPModel, CLIPProcessor

    cats = picture(CATS)
    clip, prepare = (
        CLIPModel.from_pretrained(model).float().eval(),
        CLIPProcessor.from_pretrained(processor),
    )
    inputs = prepare(
        text=CAT_AND_DOG, images=cats, padding=True, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = clip(**inputs).logits_per_image[0]
    return (
        PickScore.from_pretrained(model, processor=processor)([cats] * 2, CAT_AND_DOG),
        expected,
        0.05,
    )


def hpsv2(
    checkpoint: str | None = None, converted: str = "adams-story/HPSv2-hf"
) -> tuple[Tensor, Tensor, float]:
    """Version 2.0, of which both formats are public; 2.1 is read as its open_clip checkpoint is."""
    from huggingface_hub import hf_hub_download

    given = ([picture(CATS)] * 2, CAT_AND_DOG)
    file = checkpoint or hf_hub_download("xswu/HPSv2", "HPS_v2_compressed.pt")
    ours, theirs = HPSv2.from_pretrained(converted), HPSv2.from_pretrained(file)
    if checkpoint is None:
        print(f"HPSv2 2.1: {HPSv2()(*given).tolist()}; no example value is published")
    return theirs(*given), ours(*given), 1e-3


def aesthetic_score() -> tuple[Tensor, Tensor, float]:
    """Between 4 and 7."""
    return AestheticScore()([picture(CATS)]), torch.tensor([5.5]), 1.5


def image_reward() -> tuple[Tensor, Tensor, float]:
    """From the README of ImageReward: four oceans."""
    oceans = [picture(OCEANS.format(i)) for i in range(1, 5)]
    expected = torch.tensor(
        [0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492]
    )
    return ImageReward()(oceans, [OCEAN] * 4), expected, 0.05


def hpsv3() -> tuple[Tensor, Tensor, float]:
    """Score under its caption, and how much more that is than under another."""
    own, other = HPSv3(dtype=torch.bfloat16)([picture(CATS)] * 2, [CATS_CAPTION, CAT_AND_DOG[1]])
    return torch.stack([own, own - other]), torch.tensor([7.5, 7.5]), 7.5


def vqa_score() -> tuple[Tensor, Tensor, float]:
    """Above .5 as cats, and below as a dog."""
    reward = VQAScore(dtype=torch.bfloat16)
    return reward([picture(CATS)] * 2, CAT_AND_DOG), torch.tensor([0.75, 0.25]), 0.25


CHECKS: dict[str, Callable[[], tuple[Tensor, Tensor, float]]] = {
    "CLIPScore": clip_score,
    "PickScore": pick_score,
    "HPSv2": hpsv2,
    "AestheticScore": aesthetic_score,
    "ImageReward": image_reward,
    "HPSv3": hpsv3,
    "VQAScore": vqa_score,
}


def add_arguments(parser: ArgumentParser) -> None:
    names = ", ".join(CHECKS)
    parser.add_argument("rewards", nargs="*", metavar="REWARD", help=f"of {names}; all if left out")


def run(args: Namespace) -> None:
    """Print what each reward gives and what is published; exit with an error if they differ."""
    unknown = [name for name in args.rewards if name not in CHECKS]
    if unknown:
        raise ValueError(f"expected some of {', '.join(CHECKS)}, got {unknown[0]}")
    failed = []
    for name in args.rewards or CHECKS:
        got, expected, tolerance = CHECKS[name]()
        right = bool(((got - expected).abs() <= tolerance).all())
        verdict = "right" if right else "WRONG"
        print(f"{name}: {got.tolist()}, published {expected.tolist()} ± {tolerance}: {verdict}")
        failed += [] if right else [name]
    if failed:
        raise SystemExit(f"{', '.join(failed)}: not what is published")
