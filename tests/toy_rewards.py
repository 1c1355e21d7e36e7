"""Rewards at toy size, with images and prompts for them."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version

import checkpoints
import tiny
from glassflows.rewards import AestheticScore, CLIPScore, HPSv2, ImageReward, PickScore, VLMReward

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
WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*slow image processor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


def load(name, folders, **options):
    """Return a reward of the checkpoints that the fixture `folders` wrote."""
    return KINDS[name][0].from_pretrained(folders[name], **options)


def images(number=3, height=20, width=30, seed=0):
    return (torch.rand(number, 3, height, width, generator=tiny.seeded(seed)) * 255).round() / 255


def square(number=3, seed=0):
    """Return images of the size that the networks see."""
    return images(number, checkpoints.SIZE, checkpoints.SIZE, seed)


def pixels(images, mean=checkpoints.MEAN, std=checkpoints.STD):
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))
    return (images - mean) / std
