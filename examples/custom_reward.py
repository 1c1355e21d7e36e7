"""Two rewards of one's own: a function of ten lines, and a service that answers over HTTP.

python examples/custom_reward.py
python examples/custom_reward.py --url http://localhost:8000/score
"""

from __future__ import annotations

import argparse
import base64
import io
from typing import Any

import requests
import torch
from PIL.Image import Image
from requests.adapters import HTTPAdapter, Retry
from torch import Tensor

from glassflows import FeynmanKacSteerer
from glassflows.rewards import as_reward
from scenes import CALL, load_pipeline


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    """Return how much redder than green and blue each image (N, 3, H, W) in [0, 1] is, shape (N,)."""
    red, green, blue = images.mean((-2, -1)).unbind(1)
    return red - (green + blue) / 2


class HTTPReward:
    """Scores of a service: POST {"images": [PNG in base64, …], "prompts": […]} answers {"scores": […]}.

    Args:
        url: Where it listens.
        timeout: Seconds to wait for an answer.
        retries: Attempts after one that failed or was answered by a server error; each waits twice as long.

    Raises:
        requests.RequestException: if it does not answer well after all of them; the pipeline is as it was.
    """

    reward_scale = 10.0  # what the steerer takes if it is given none

    def __init__(self, url: str, *, timeout: float = 30.0, retries: int = 4) -> None:
        self.url, self.timeout = url, timeout
        self.session = requests.Session()
        again = Retry(retries, backoff_factor=0.5, status_forcelist=[429, 500, 502, 503, 504], allowed_methods=["POST"])
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=again))
        self._scores = as_reward(self._asked)  # tensors into pictures

    def __call__(self, images: Tensor, prompts: list[str]) -> Any:
        return self._scores(images, prompts)

    def _asked(self, pictures: list[Image], prompts: list[str]) -> list[float]:
        body = {"images": [encoded(picture) for picture in pictures], "prompts": prompts}
        answer = self.session.post(self.url, json=body, timeout=self.timeout)
        answer.raise_for_status()
        return answer.json()["scores"]


def encoded(picture: Image) -> str:
    """Return a picture as PNG in base64."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a service that scores images; without it redness steers")
    args = parser.parse_args()
    reward = HTTPReward(args.url) if args.url else redness
    pipe, call = load_pipeline(), {"num_inference_steps": 20, **CALL}
    for name, threshold in (("best of 8", 0.0), ("steered", 0.5)):
        steerer = FeynmanKacSteerer(pipe, reward, num_particles=8, reward_scale=100, ess_threshold=threshold)
        out = steerer("a red circle left of a blue square", generator=torch.Generator().manual_seed(0), **call)
        print(f"{name:10} best {out.rewards.max():.3f}, mean {out.rewards.mean():.3f}")


if __name__ == "__main__":
    main()
