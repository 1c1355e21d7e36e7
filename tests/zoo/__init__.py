"""Diffusers' own pipeline classes at toy size, built offline with random weights: a module per family.

Every module has a list `CASES`. Text encoders are left out where the pipeline takes embeddings; classes are named, not
imported, so that an older diffusers without one of them only skips it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor

Task = Literal["text", "class", "unconditional", "image", "inpaint", "control", "edit", "upscale", "video", "audio"]


@dataclass(frozen=True)
class Case:
    """One pipeline class.

    Args:
        name: The class, an attribute of `diffusers`.
        build: Makes the pipeline with the scheduler its checkpoints come with; the same weights each time.
        call: Makes the keyword arguments of a call for one sample, without number of steps, generator, output type.
        networks: The components whose forward calls are network calls.
        task: What the pipeline does; "image" starts from a noised image, "inpaint" keeps a part of one.
        variant: Tells cases of the same class apart.
    """

    name: str
    build: Callable[[], Any]
    call: Callable[[], dict[str, Any]]
    networks: tuple[str, ...] = ("transformer",)
    task: Task = "text"
    variant: str = ""

    @property
    def label(self) -> str:
        return f"{self.name}, {self.variant}" if self.variant else self.name


def pipeline(name: str, **components: Any) -> Any:
    """Return a pipeline of a named class, its networks in evaluation mode, its progress bar off."""
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipe = getattr(diffusers, name)(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal numbers, to stand for embeddings."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image(height: int, width: int, seed: int = 0) -> Tensor:
    """Return an image (1, 3, height, width) in [0, 1]."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def mask(height: int, width: int) -> Tensor:
    """Return a mask (1, 1, height, width) that asks for the left half to be painted."""
    painted = torch.zeros(1, 1, height, width)
    painted[..., : width // 2] = 1
    return painted


def autoencoder_kl(latent_channels: int = 4, **config: Any) -> Any:
    """Return an image autoencoder that halves each side."""
    torch.manual_seed(1)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
    }
    config = {"latent_channels": latent_channels, "sample_size": 16, "scaling_factor": 0.7} | config
    return diffusers.AutoencoderKL(**(blocks | config))  # type: ignore[arg-type]
