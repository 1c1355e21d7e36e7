"""What a gradient through FLUX's autoencoder holds in memory, for a twist of one particle (docs/steering.md).

Of random weights: sizes do not depend on them. Prints the bytes that autograd keeps between the decode and its
backward, without the weights; they grow with the number of pixels. Under checkpointing a block's own come on top, one
block at a time. Two minutes on 2 cores.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor


def flux_autoencoder() -> Any:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return AutoencoderKL(**config).eval()


def kept(vae: Any, side: int) -> int:
    """Return the bytes kept for the backward of one decode of an image of `side` × `side` pixels."""
    latents = torch.randn(1, 16, side // 8, side // 8, dtype=vae.dtype, requires_grad=True)
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        image = vae.decode(latents).sample
    for parameter in vae.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    torch.autograd.grad(image.square().mean(), latents)
    return sum(sizes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=128, help="of the image, in pixels")
    side = parser.parse_args().side
    print(f"| | {side}² pixels, GiB | so at 1024², GiB |\n|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        vae = flux_autoencoder().to(dtype)
        for checkpointing in (False, True):
            if checkpointing:
                vae.enable_gradient_checkpointing()
            size = kept(vae, side) / 2**30
            name = f"{str(dtype).removeprefix('torch.')}{', gradient checkpointing' * checkpointing}"
            print(f"| {name} | {size:.2f} | {size * (1024 / side) ** 2:.1f} |", flush=True)


if __name__ == "__main__":
    main()
