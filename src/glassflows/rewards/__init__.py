"""Rewards: callables `reward(images, prompts)` from images (N, 3, H, W) in [0, 1] to N scores, higher is better."""

from .adapters import as_reward
from .clip import CLIPScore

__all__ = ["CLIPScore", "as_reward"]
