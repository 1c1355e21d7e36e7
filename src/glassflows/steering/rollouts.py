"""A folder to which steered calls add their samples, for training."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from .display import as_picture
from .record import as_array
from .result import SteeringResult
from .samples import Samples, best_and_worst
from .trajectory import Trajectories

_LINES = "rollouts.jsonl"
_ROWS = ("latents", "images")
_OF_TRAJECTORY = "trajectory."


class Rollouts(Dataset[dict[str, Any]]):
    """Samples of steered calls, on disk: a `torch.utils.data.Dataset`.

    `rollouts.jsonl` has a line for each sample, with its prompt, reward, log-weight and lineage.
    The tensors of a call are in a safetensors file of their own. A call that is there already is
    not added again, and one that was cut off while it was written is not there. Several processes
    may add calls of different keys to the same folder; each sees what was there when it began.

    Args:
        folder: Where the files are; it is made by the first `add`.

    Example:
        rollouts = Rollouts("rollouts")
        for prompt in prompts:
            if prompt not in rollouts:
                rollouts.add(steer(prompt), key=prompt)
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self._rows: list[dict[str, Any]] = []
        self._keys: set[str] = set()
        if self._path.exists():
            self._read()

    @property
    def _path(self) -> Path:
        return self.folder / _LINES

    def _read(self) -> None:
        """Read the lines of calls that were written to their end."""
        begun: list[dict[str, Any]] = []
        for line in self._path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # it was cut off
                continue
            goes_on = begun and row["file"] == begun[0]["file"] and row["row"] == len(begun)
            begun = [*begun, row] if goes_on else [row]
            is_whole = begun[0]["row"] == 0 and len(begun) == row["of"]
            if is_whole and row["key"] not in self:
                self._rows += begun
                self._keys.add(row["key"])

    def add(self, result: SteeringResult | Samples, key: str | None = None) -> bool:
        """Add the samples of a call; return whether they are new.

        Args:
            result: What the call returned.
            key: What tells the call from others, such as its prompt and seed; None for what it
                drew, so that the same call is not added twice.

        Raises:
            ValueError: if the result has no latents.
        """
        samples = result.samples() if isinstance(result, SteeringResult) else result
        key = _digest(samples) if key is None else str(key)
        if key in self._keys:
            return False
        name = f"{uuid.uuid4().hex}.safetensors"  # two processes may add the same key
        rows = [
            {
                "key": key,
                "row": i,
                "of": len(samples),
                "prompt": samples.prompts[i],
                "group": int(samples.groups[i]),
                "reward": float(samples.rewards[i]),
                "worth": float(samples.worth[i]),
                "log_weight": _finite(float(samples.log_weights[i])),
                "lineage": samples.lineages[i].tolist(),
                "file": name,
            }
            for i in range(len(samples))
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{name}.new"
        try:
            save_file(_tensors(samples), unfinished)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        unfinished.replace(self.folder / name)
        with self._path.open("ab+", buffering=0) as file:  # in one write, beside other processes
            whole = _ends_in_newline(file)
            file.write(text.encode() if whole else b"\n" + text.encode())
        self._rows += rows
        self._keys.add(key)
        return True

    def __contains__(self, key: object) -> bool:
        return str(key) in self._keys

    def __len__(self) -> int:
        """The number of samples."""
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Return a sample: what its line says, `latents` and `image`, as tensors.

        Raises:
            TypeError: for a slice; `torch.utils.data.Subset` is a part of a dataset.
        """
        row = self._rows[operator.index(i)]
        with safe_open(self.folder / row["file"], "pt") as file:
            latents, image = (file.get_slice(name)[row["row"]] for name in _ROWS)
        log_weight = math.nan if row["log_weight"] is None else row["log_weight"]
        return {**row, "log_weight": log_weight, "latents": latents, "image": image}

    @staticmethod
    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch of samples: `latents` and `image` stacked, a list of everything else.

        It is the `collate_fn` of a `DataLoader`, whose own takes no prompt that is None and no
        lineages of several lengths.
        """
        batch = {name: [row[name] for row in rows] for name in rows[0]}
        return batch | {name: torch.stack(batch[name]) for name in ("latents", "image")}

    def trajectories(self, key: str) -> Trajectories | None:
        """Return the transitions of the samples of a call, if it recorded them.

        Raises:
            KeyError: if no call of that key is there.
        """
        row = next((row for row in self._rows if row["key"] == str(key)), None)
        if row is None:
            raise KeyError(f"expected the key of a call in {self.folder}, got {key!r}")
        with safe_open(self.folder / row["file"], "pt") as file:
            names = [name for name in file.keys() if name.startswith(_OF_TRAJECTORY)]  # noqa: SIM118
            fields = {name.removeprefix(_OF_TRAJECTORY): file.get_tensor(name) for name in names}
        return Trajectories(**fields) if fields else None

    def pairs(self, margin: float = 0.0) -> list[tuple[int, int]]:
        """Return the indices of the best and the worst sample of each prompt of each call.

        Args:
            margin: A pair whose rewards differ by no more is left out.
        """
        groups = [(row["key"], row["group"]) for row in self._rows]
        return best_and_worst(groups, [row["worth"] for row in self._rows], margin)

    def as_dict(self) -> dict[str, list[Any]]:
        """Return columns of all samples, such as `datasets.Dataset.from_dict` takes.

        `datasets.Dataset.from_generator(rollouts.rows)` holds one at a time.
        """
        rows = list(self.rows())
        return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the samples as PIL images, lists of them, arrays, numbers and texts."""
        for row in self:
            yield {**row, "latents": as_array(row["latents"]), "image": as_picture(row["image"])}


def _tensors(samples: Samples) -> dict[str, Tensor]:
    tensors = {"latents": samples.latents, "images": samples.images}
    if samples.trajectories is not None:
        named = samples.trajectories._asdict().items()
        tensors |= {_OF_TRAJECTORY + name: value for name, value in named}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _digest(samples: Samples) -> str:
    """Return a text that tells these samples from others."""
    latents = samples.latents.contiguous().view(torch.uint8).numpy().tobytes()
    told = json.dumps([samples.prompts, samples.rewards.tolist()]).encode()
    return hashlib.sha256(told + latents).hexdigest()[:32]


def _ends_in_newline(file: Any) -> bool:
    """Return whether a file is empty or ends in a newline; the next write is at its end."""
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _finite(number: float) -> float | None:
    return None if math.isnan(number) else number
