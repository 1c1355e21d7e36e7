"""A reward of one's own: a function of three lines, here or behind a server.

python examples/custom_reward.py
cd examples && python -m glassflows.serve custom_reward:redness &    # on this machine or another
python examples/custom_reward.py --url http://localhost:8000
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from glassflows import FeynmanKacSteerer
from glassflows.rewards import RemoteReward
from scenes import CALL, load_pipeline


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    """Return how much redder than green and blue each image (N, 3, H, W) in [0, 1] is, shape (N,)."""
    red, green, blue = images.mean((-2, -1)).unbind(1)
    return red - (green + blue) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a server of rewards; without it redness steers from here")
    args = parser.parse_args()
    reward = RemoteReward(args.url) if args.url else redness
    pipe, call = load_pipeline(), {"num_inference_steps": 20, **CALL}
    for name, threshold in (("best of 8", 0.0), ("steered", 0.5)):
        steerer = FeynmanKacSteerer(pipe, reward, num_particles=8, reward_scale=100, ess_threshold=threshold)
        out = steerer("a red circle left of a blue square", generator=torch.Generator().manual_seed(0), **call)
        print(f"{name:10} best {out.rewards.max():.3f}, mean {out.rewards.mean():.3f}")


if __name__ == "__main__":
    main()
