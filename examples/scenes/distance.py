"""How far samples of prompts are from real scenes of the same prompts."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .draw import draw
from .grammar import parse


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Return 2 E|a − b| − E|a − a′| − E|b − b′| of two samples, unbiased: it scatters about 0 for equal laws."""
    a, b = a.flatten(1).double(), b.flatten(1).double()

    def within(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    return float(2 * torch.cdist(a, b).mean() - within(a) - within(b))


def distances(vae: Any, images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Return the energy distance of each prompt's images to real scenes, in an autoencoder's latents, shape (P,).

    Args:
        vae: The autoencoder.
        images: Shape (P, K, 3, H, W), in [0, 1]; NaN is returned for K = 1.
        prompts: P prompts of the grammar.
    """
    if images.shape[1] == 1:
        return np.full(len(prompts), np.nan)
    drawn = _encoded(vae, images.reshape(-1, *images.shape[2:])).unflatten(0, images.shape[:2])
    return np.array([energy_distance(mine, real) for mine, real in zip(drawn, _real(vae, tuple(prompts)), strict=True)])


@cache
def _real(vae: Any, prompts: tuple[str, ...], number: int = 64) -> Tensor:
    """Return latents of `number` scenes of each prompt, drawn by its rules, shape (P, number, …)."""
    rng = np.random.default_rng(0)
    images = np.stack([draw(parse(prompt), rng) for prompt in prompts for _ in range(number)])
    return _encoded(vae, images).unflatten(0, (len(prompts), number))


@torch.no_grad()
def _encoded(vae: Any, images: np.ndarray) -> Tensor:
    parts = torch.from_numpy(images).to(vae.device).split(256)
    return torch.cat([vae.encode(2 * part - 1).latent_dist.mode().flatten(1) for part in parts]).cpu()
