"""Steer one prompt of the embedded scenes model and draw where its particles came from."""

import sys
from pathlib import Path

import matplotlib
import torch

from glassflows import FeynmanKacSteerer
from scenes import CALL, load_pipeline, load_reward

matplotlib.use("Agg")


def main(path: Path = Path("genealogy.png")) -> None:
    steerer = FeynmanKacSteerer(
        load_pipeline(), load_reward(), num_particles=8, num_transitions=5, ess_threshold=0.7, start=0.0, previews=True
    )
    out = steerer(
        "a red circle left of a blue square",
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(1),
        **CALL,
    )
    out.plot().savefig(path, dpi=110)
    print(f"{out.ledger}\nwrote {path}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
