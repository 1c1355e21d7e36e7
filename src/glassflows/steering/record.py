"""What of a steered call is written down: its recipe, and a folder with its images and numbers."""

from __future__ import annotations

import base64
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL.Image import Image, frombytes
from PIL.Image import open as open_image
from torch import Tensor

from ..host.ledger import Ledger
from .calibration import Calibration
from .trajectory import Trajectories

if TYPE_CHECKING:
    from .result import SteeringResult

_RECORD, _SAMPLES, _ARRAYS = "steering.json", "samples.npy", "arrays.npz"
_COUNTS = ("network_calls", "decodes", "reward_calls", "gradients")
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
    "diversity",
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
    if draws_by_default(given):
        drawing["global_generator"] = _default_generator(pipe)
    config = scheduler.config
    return {
        "versions": versions(),
        "pipeline": type(pipe).__name__,
        "scheduler": {name: written(dict(config[name])) for name in ("native", "glass")},
        "reward": getattr(reward, "__name__", type(reward).__name__),
        "strategy": type(strategy).__name__,
        "steerer": {name: written(value) for name, value in options.items()},
        "call": {name: written(value) for name, value in (given | drawing).items()},
    }


def save(result: SteeringResult, folder: str | Path) -> Path:
    """Write a result to a folder, in the place of one that was saved there; return the folder.

    Everything that may fail for what the result holds comes before the first file is touched.

    Raises:
        FileExistsError: if the folder holds a file of such a name that no result put there.
    """
    folder = Path(folder).expanduser()
    arrays: dict[str, np.ndarray] = {}
    films = result.films() or []
    pictures = {name: film.png() for name, film in zip(_names(len(films)), films, strict=True)}
    exact = not isinstance(result.images, list)
    record: dict[str, Any] = {name: getattr(result, name).tolist() for name in _FIELDS}
    record["lineages"] = result.lineages.tolist()  # for readers; it follows from `ancestors`
    record["transitions"] = result.transitions
    record["parts"] = {name: part.tolist() for name, part in result.parts.items()}
    record["seen"] = None if result.seen is None else result.seen.tolist()
    record["strategy"] = result.strategy
    record["interrupted"] = result.interrupted
    record["images"] = list(pictures)
    record["samples"] = _look(result.images) if exact else _look_of_films(films, result.images)
    record["others"] = _packed(result.others, arrays)
    record["previews"] = _packed(result.previews, arrays)
    record["latents"] = _packed(result.latents, arrays)
    record["trajectories"] = _packed(result.trajectories, arrays)
    record["recipe"] = result.recipe
    record["ledger"] = {**vars(result.ledger), "seconds": dict(result.ledger.seconds)}
    record["files"] = [*pictures, *[_SAMPLES] * exact, *[_ARRAYS] * bool(arrays)]
    paths: list[list[str | int]] = []
    record = _as_json(record, [], paths)
    text = json.dumps(record | {"not_finite": paths}, indent=1, allow_nan=False)

    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder, [_RECORD, *record["files"]])
    (folder / _RECORD).write_text(text, encoding="utf-8")  # first, so that what follows is ours
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
    if exact:
        np.save(folder / _SAMPLES, as_array(result.images))
    if arrays:
        np.savez_compressed(folder / _ARRAYS, **arrays)  # type: ignore[arg-type]
    return folder


def load(folder: str | Path) -> dict[str, Any]:
    """Return the fields of a result that was saved in a folder.

    Raises:
        FileNotFoundError: if none was.
        ValueError: if it was saved by a version that could not load.
    """
    folder = Path(folder).expanduser()
    record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    if "samples" not in record:
        raise ValueError(
            f"load: expected a result of this version in {folder}, got one that lacks what load "
            "reads: its images and numbers can be read by other means"
        )
    for *way, last in record["not_finite"]:
        place = record
        for key in way:
            place = place[key]
        place[last] = float(place[last])
    arrays: dict[str, np.ndarray] = {}
    if _ARRAYS in record["files"]:
        with np.load(folder / _ARRAYS, allow_pickle=False) as archive:
            arrays = dict(archive)
    prompts, particles = np.shape(record["rewards"])
    scorings = len(record["transitions"])
    shapes: dict[str, tuple[int, ...]] = {
        "resampled": (scorings, prompts),
        "ess": (scorings, prompts),
        "ancestors": (scorings, prompts, particles),
        "scored": (scorings, prompts, particles),
    }
    kinds: dict[str, torch.dtype] = {
        "ancestors": torch.int64,
        "order": torch.int64,
        "resampled": torch.bool,
    }
    record.setdefault("diversity", [math.nan] * prompts)  # of a result from before it was measured
    fields = {}
    for name in _FIELDS:
        values = torch.tensor(record[name], dtype=kinds.get(name, torch.float64))
        fields[name] = values if scorings else values.view(shapes.get(name, values.shape))
    seen = record.get("seen")
    fields["seen"] = None if seen is None else torch.tensor(seen, dtype=torch.float64)
    fields["parts"] = {
        name: torch.tensor(part, dtype=torch.float64)
        for name, part in record.get("parts", {}).items()  # earlier versions kept none
    }
    trajectories = _unpacked(record.get("trajectories"), arrays)
    counts = {name: record["ledger"].get(name, 0) for name in _COUNTS}
    ledger = Ledger(**counts, seconds=defaultdict(float, record["ledger"]["seconds"]))
    return fields | {
        "images": _samples(folder, record["samples"]),
        "transitions": tuple(record["transitions"]),
        "strategy": record["strategy"],
        "interrupted": record["interrupted"],
        "others": _unpacked(record["others"], arrays),
        "previews": _unpacked(record["previews"], arrays),
        "latents": _unpacked(record.get("latents"), arrays),  # earlier versions kept none
        "trajectories": None if trajectories is None else Trajectories(*trajectories),
        "recipe": record["recipe"],
        "ledger": ledger,
    }


def _names(number: int) -> list[str]:
    return [f"{i:03d}.png" for i in range(number)]


def _clear(folder: Path, names: list[str]) -> None:
    """Delete what an earlier result put into a folder.

    Raises:
        FileExistsError: if a file that is none of these has one of the names.
    """
    ours = _written_there(folder)
    others = [name for name in names if name not in ours and (folder / name).exists()]
    if others:
        raise FileExistsError(
            f"save: expected a folder of its own, got {folder}, in which no result put "
            f"{', '.join(others)}: name another folder"
        )
    for name in ours:
        (folder / name).unlink(missing_ok=True)


def _written_there(folder: Path) -> list[str]:
    """Return the names of the files that an earlier result put into a folder."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        named = record.get("files", [*record["images"], _SAMPLES]) if record["recipe"] else []
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []  # not one of ours
    known = (_SAMPLES, _ARRAYS, *_names(len(named)))
    return [_RECORD, *(name for name in named if name in known)]


# ---- what JSON cannot hold -----------------------------------------------------------------------


def _as_json(value: Any, path: list[str | int], paths: list[list[str | int]]) -> Any:
    """Return a value with numbers that are not finite as texts, and append where these are."""
    if isinstance(value, float) and not math.isfinite(value):
        paths.append(path)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: _as_json(one, [*path, name], paths) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(one, [*path, i], paths) for i, one in enumerate(value)]
    return value


def _packed(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Return what JSON can hold of a value; arrays and the like are put into `arrays`.

    Only what is no plain JSON value becomes an object, which says in its first key what it was.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    key = str(len(arrays))
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.dtype != object:
        arrays[key] = as_array(value)
        return {"array": key, **_look(value)}
    if isinstance(value, Image):
        arrays[key] = np.frombuffer(value.tobytes(), np.uint8)
        return {"image": key, "mode": value.mode, "size": value.size}
    if isinstance(value, list):
        return [_packed(one, arrays) for one in value]
    if isinstance(value, tuple):
        return {"tuple": [_packed(one, arrays) for one in value]}
    if isinstance(value, dict):
        return {"dict": {str(name): _packed(one, arrays) for name, one in value.items()}}
    return _packed(written(value), arrays)


def _unpacked(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Return the value that `_packed` made something of."""
    if isinstance(value, list):
        return [_unpacked(one, arrays) for one in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_unpacked(one, arrays) for one in value["tuple"])
    if "dict" in value:
        return {name: _unpacked(one, arrays) for name, one in value["dict"].items()}
    if "image" in value:
        return frombytes(value["mode"], tuple(value["size"]), arrays[value["image"]].tobytes())
    return _as_it_was(arrays[value["array"]], value)


def _look(value: Any) -> dict[str, str]:
    """Return what an array in a file does not say: whether it was a tensor, and its dtype."""
    kind = {Tensor: "tensor", np.ndarray: "ndarray"}
    name = next((kind[cls] for cls in kind if isinstance(value, cls)), "scalar")
    return {"kind": name, "dtype": str(value.dtype).removeprefix("torch.")}


def as_array(value: Any) -> np.ndarray:
    """Return an array or tensor as an array; numpy knows no bfloat16, of which floats are made."""
    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    return (value if hasattr(np, _look(value)["dtype"]) else value.float()).numpy()


def _as_it_was(array: np.ndarray, look: dict[str, str]) -> Any:
    """Return an array that was read as what it was when it was written."""
    if look["kind"] == "tensor":
        return torch.from_numpy(array).to(getattr(torch, look["dtype"]))
    return array[()] if look["kind"] == "scalar" else array


def _look_of_films(films: list[Any], images: list[Any]) -> dict[str, Any]:
    """Return what the PNG files of films do not say."""
    return {
        "kind": "videos" if isinstance(images[0], list) else "images",
        "frames": [len(film) for film in films],
        "mode": films[0][0].mode,
    }


def _samples(folder: Path, look: dict[str, Any]) -> Any:
    """Return the images, videos or other samples that were saved."""
    if "frames" not in look:
        return _as_it_was(np.load(folder / _SAMPLES, allow_pickle=False), look)
    films = [
        _film(folder / name, number, look["mode"])
        for name, number in zip(_names(len(look["frames"])), look["frames"], strict=True)
    ]
    return films if look["kind"] == "videos" else [film[0] for film in films]


def _film(path: Path, number: int, mode: str) -> list[Image]:
    """Return the frames of a PNG file, in which a frame that is repeated is shown for longer."""
    with open_image(path) as file:
        shown = getattr(file, "n_frames", 1)
        frames: list[Image] = []
        for i in range(shown):
            file.seek(i)
            times = number if shown == 1 else round(file.info["duration"] / 100)
            frames += [file.convert(mode) for _ in range(times)]
    return frames


# ---- recipes -------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Return the versions a result depends on; "unknown" for a package that is not installed."""
    from .. import __version__

    found = {"glassflows": __version__}
    for name in ("torch", "diffusers", "transformers", "numpy"):
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
    if isinstance(value, Calibration):
        return value.record()
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


def draws_by_default(given: Mapping[str, Any]) -> bool:
    """Return whether a call draws its initial latents from torch's default generator."""
    return given.get("generator") is None and given.get("latents") is None


def _default_generator(pipe: Any) -> torch.Generator:
    """Return what a pipeline draws from that is given no generator."""
    device = torch.device(pipe._execution_device)
    on_cuda = device.type == "cuda"
    return torch.cuda.default_generators[device.index or 0] if on_cuda else torch.default_generator
