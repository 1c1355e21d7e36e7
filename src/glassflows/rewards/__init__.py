"""Rewards: callables `reward(images, prompts)` that return one score per image.

Images have shape (N, 3, H, W) and values in [0, 1]. Higher scores are better.
"""

from .adapters import as_reward
from .aesthetic import AestheticScore
from .chat import ChatReward
from .clip import CLIPScore, HPSv2, PickScore
from .compose import Minimum, Negate, Product, Ranked, Standardize, Sum
from .http import RemoteRewardError
from .image_reward import ImageReward
from .remote import RemoteReward
from .resemblance import Resemblance
from .vlm import VLMReward

__all__ = [
    "AestheticScore",
    "CLIPScore",
    "ChatReward",
    "HPSv2",
    "ImageReward",
    "Minimum",
    "Negate",
    "PickScore",
    "Product",
    "Ranked",
    "RemoteReward",
    "RemoteRewardError",
    "Resemblance",
    "Standardize",
    "Sum",
    "VLMReward",
    "as_reward",
]


def __dir__() -> list[str]:
    return __all__
