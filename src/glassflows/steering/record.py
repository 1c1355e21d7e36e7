"""What of a steered call is written down: its recipe, and a folder with its images and numbers."""

from __future__ import annotations

import base64
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .result import SteeringResult

_FIELDS = (
    "rewards",
    "log_weights",
    "ancestors",
    "resampled",
    "ess",
    "scored",
    "log_evidence",
    "reward_scale",
    "order",
)


def recipe(
    pipe: Any,
    scheduler: Any,
    reward: Any,
    strategy: Any,
    options: dict[str, Any],
    given: dict[str, Any],
) -> dict[str, Any]:
    """Return what reproduces a call, as far as JSON can say it; to be taken before it draws.

    Args:
        pipe: The pipeline.
        scheduler: The GLASS scheduler that runs it.
        reward: The reward.
        strategy: The strategy.
        options: The options of the steerer.
        given: The keyword arguments of the call.
    """
    drawing: dict[str, Any] = {}
    if not {"generator", "latents"} & given.keys():
        drawing["global_generator"] = _default_generator(pipe)
    config = scheduler.config
    return {
        "versions": versions(),
        "pipeline": type(pipe).__name__,
        "scheduler": {"native": dict(config["native"]), "glass": dict(config["glass"])},
        "reward": getattr(reward, "__name__", type(reward).__name__),
        "strategy": type(strategy).__name__,
        "steerer": {name: written(value) for name, value in options.items()},
        "call": {name: written(value) for name, value in (given | drawing).items()},
    }


def save(result: SteeringResult, folder: str | Path) -> Path:
    """Write the images of a result and `steering.json`; return the folder.

    Images are PNG files, videos animated ones, latents and sound are `samples.npy`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    films = result.films()
    if films is None:
        images = result.images
        is_tensor = isinstance(images, Tensor)
        values = images.cpu().float().numpy() if is_tensor else np.asarray(images)
        np.save(folder / "samples.npy", values)
    names = [f"{i:03d}.png" for i in range(len(films or []))]
    for name, film in zip(names, films or [], strict=True):
        (folder / name).write_bytes(film.png())
    record: dict[str, Any] = {name: getattr(result, name).tolist() for name in _FIELDS}
    record["transitions"] = result.transitions
    record["interrupted"] = result.interrupted
    record["images"] = names
    record["recipe"] = result.recipe
    record["ledger"] = {**vars(result.ledger), "seconds": dict(result.ledger.seconds)}
    text = json.dumps(record, indent=1, allow_nan=False)
    (folder / "steering.json").write_text(text)
    return folder


def versions() -> dict[str, str]:
    """Return the versions a result depends on; "unknown" for a package that is not installed."""
    found = {}
    for name in ("glassflows", "torch", "diffusers", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # it is run from source
            found[name] = "unknown"
    return found


def written(value: Any) -> Any:
    """Return a value as JSON can hold it.

    Generators are written by seed and state, large arrays and other objects by their look.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Generator):
        return _written_generator(value)
    if isinstance(value, dict):
        return {str(name): written(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [written(one) for one in value]
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        small = np.prod(value.shape) <= 1000
        return value.tolist() if small else f"{type(value).__name__} {tuple(value.shape)}"
    return getattr(value, "__name__", type(value).__name__)


def _written_generator(generator: torch.Generator) -> dict[str, Any]:
    seed, state = generator.initial_seed(), generator.get_state()
    fresh = torch.Generator(generator.device).manual_seed(seed).get_state()
    record: dict[str, Any] = {"seed": seed, "device": str(generator.device)}
    if not torch.equal(state, fresh):  # it has been drawn from
        record["state"] = base64.b64encode(state.numpy().tobytes()).decode()
    return record


def _default_generator(pipe: Any) -> torch.Generator:
    """Return what a pipeline draws from that is given no generator."""
    device = torch.device(pipe._execution_device)
    on_cuda = device.type == "cuda"
    return torch.cuda.default_generators[device.index or 0] if on_cuda else torch.default_generator
