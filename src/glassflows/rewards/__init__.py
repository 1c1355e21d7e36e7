"""Rewards: callables `reward(images, prompts)` that return one score per image.

Images have shape (N, 3, H, W) and values in [0, 1]. Higher scores are better.
"""

from .adapters import as_reward
from .aesthetic import AestheticScore
from .chat import ChatReward
from .clap import CLAPScore
from .clip import CLIPScore, HPSv2, PickScore
from .compose import Minimum, Negate, Product, Ranked, Standardize, Sum
from .frames import Frames
from .hpsv3 import HPSv3
from .http import RemoteRewardError
from .image_reward import ImageReward
from .ocr import OCRScore
from .questions import QuestionScore, VQAScore
from .remote import RemoteReward
from .resemblance import Resemblance
from .vlm import VLMReward

__all__ = [
    "AestheticScore",
    "CLAPScore",
    "CLIPScore",
    "ChatReward",
    "Frames",
    "HPSv2",
    "HPSv3",
    "ImageReward",
    "Minimum",
    "Negate",
    "OCRScore",
    "PickScore",
    "Product",
    "QuestionScore",
    "Ranked",
    "RemoteReward",
    "RemoteRewardError",
    "Resemblance",
    "Standardize",
    "Sum",
    "VLMReward",
    "VQAScore",
    "as_reward",
]


def __dir__() -> list[str]:
    return __all__
