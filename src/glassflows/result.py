"""What a steered call returns: images, how they came about, and what it cost."""

from __future__ import annotations

import base64
import html
import io
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL.Image import Image
from torch import Tensor


@dataclass
class Ledger:
    """What a steered call cost.

    Args:
        network_calls: Evaluations of the denoiser, one per particle and step (two network passes each under guidance).
        decodes: Latents decoded for the reward, one per particle and scoring; the pipeline's own last ones not counted.
        reward_calls: Samples scored.
        seconds: Wall-clock seconds: "network", "decode", "reward", "total"; the rest of the total is the pipeline's own
            (text encoders, its last decoding). An accelerator is waited for at either end of each, so that none is
            charged with what another queued.
    """

    network_calls: int = 0
    decodes: int = 0
    reward_calls: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Add the time of a block to `seconds[what]`."""
        start = _now()
        try:
            yield
        finally:
            self.seconds[what] += _now() - start


@dataclass(frozen=True)
class SteeringResult:
    """What a steered call returns. P prompts, K particles each, S scorings on the way, n samples returned of each.

    Args:
        images: The P · n images (or videos, or waveforms), prompt-major, in the pipeline's own `output_type`; best
            first within each prompt, or in the order drawn for `select="sample"`.
        rewards: Reward of each final particle, in slot order, shape (P, K), float64.
        log_weights: Final log-weights, normalised within each prompt, in slot order, shape (P, K).
        ancestors: Parent slots within the prompt's group at each scoring, shape (S, P, K), int64.
        resampled: Which groups were resampled at each scoring, shape (S, P), bool.
        ess: Effective sample size before resampling at each scoring, shape (S, P).
        scored: Rewards of the denoised predictions at each scoring, before resampling, shape (S, P, K), float64.
        transitions: Number of the transition at whose start each scoring took place, length S.
        log_evidence: Estimate of log E[exp(λ_r r)] over the model's own samples, shape (P,).
        reward_scale: λ_r of the final weighing, shape (P,); chosen by the run where it was "auto".
        order: Slot of each returned image, shape (P, n): `images[p * n + i]` came from slot `order[p, i]`.
        interrupted: Whether `pipe._interrupt` ended the run: the images are then denoised as far as it came.
        others: What else the pipeline put out, by its name, rows like those of `images`: sound, verdicts on safety.
        ledger: What it cost.
        previews: Denoised predictions at each scoring as the reward saw them, (S, P · K, …), uint8 (latents and sound
            as floats); None unless asked for.
        recipe: What reproduces the call: versions, options, arguments.
    """

    images: Any
    rewards: Tensor
    log_weights: Tensor
    ancestors: Tensor
    resampled: Tensor
    ess: Tensor
    scored: Tensor
    transitions: tuple[int, ...]
    log_evidence: Tensor
    reward_scale: Tensor
    order: Tensor
    interrupted: bool
    others: dict[str, Any]
    ledger: Ledger
    previews: Tensor | None
    recipe: dict[str, Any]

    @property
    def frames(self) -> Any:
        """`images`, by the name that video pipelines give it."""
        return self.images

    @property
    def audios(self) -> Any:
        """The sound beside a video, where there is some; else `images`, by the name that audio pipelines give it."""
        return self.others.get("audio", self.images)

    @property
    def image_rewards(self) -> Tensor:
        """Reward of each of `images`, shape (P · n,); `rewards` is in slot order."""
        return self.rewards.gather(1, self.order).flatten()

    def lineage(self, prompt: int = 0, slot: int | None = None) -> list[int]:
        """Return the slots a final particle descends from, one per scoring and its own at the end.

        Args:
            prompt: Index of the prompt.
            slot: The final slot; the best if None.
        """
        slots = [int(self.rewards[prompt].argmax()) if slot is None else slot]
        for ancestors in self.ancestors[:, prompt].flip(0):
            slots.append(int(ancestors[slots[-1]]))
        return slots[::-1]

    def plot(self, prompt: int = 0) -> Any:
        """Draw the genealogy of a prompt's particles, with its ESS and rewards beside; return a matplotlib figure."""
        from .plotting import genealogy  # matplotlib is an extra

        return genealogy(self, prompt)

    def save(self, folder: str | Path) -> Path:
        """Write the images as PNG, videos as animated ones, latents and sound as `samples.npy`, and `steering.json`.

        The file has the rewards, weights, ancestors, ledger and what reproduces the call. Returns the folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        films = self._films()
        if films is None:
            values = self.images.cpu().float().numpy() if isinstance(self.images, Tensor) else np.asarray(self.images)
            np.save(folder / "samples.npy", values)
        names = [f"{i:03d}.png" for i in range(len(films or []))]
        for name, film in zip(names, films or [], strict=True):
            (folder / name).write_bytes(_png(film))
        fields = ("rewards", "log_weights", "ancestors", "resampled", "ess", "scored", "log_evidence", "reward_scale",
                  "order")  # fmt: skip
        record = {name: getattr(self, name).tolist() for name in fields}
        record |= {
            "transitions": self.transitions,
            "interrupted": self.interrupted,
            "images": names,
            "recipe": self.recipe,
        }
        record["ledger"] = {**vars(self.ledger), "seconds": dict(self.ledger.seconds)}
        (folder / "steering.json").write_text(json.dumps(record, indent=1, allow_nan=False))
        return folder

    def _repr_html_(self) -> str:
        """Show the images, or videos, and their rewards, in notebooks."""
        films = self._films()
        if films is None:
            return f"<pre>{self.rewards.tolist()}</pre>"
        prompts = self.recipe["call"].get("prompt")
        titles = [prompts] if isinstance(prompts, str) else prompts or []
        cells, each = [], self.order.shape[1]
        for i, (film, reward) in enumerate(zip(films, self.image_rewards.tolist(), strict=True)):
            if i % each == 0 and titles:
                cells.append(f"<p>{html.escape(str(titles[i // each]))}</p>")
            source = base64.b64encode(_png(film)).decode()
            cells.append(
                f'<figure style="display:inline-block;margin:4px"><img src="data:image/png;base64,{source}" '
                f'style="max-width:256px"><figcaption>{reward:.4g}</figcaption></figure>'
            )
        return "".join(cells)

    def _films(self) -> list[list[Image]] | None:
        """Return the frames of each image (one) or video; None for latents and sound."""
        if isinstance(self.images, list):
            films = [film if isinstance(film, list) else [film] for film in self.images]
            return films if films and isinstance(films[0][0], Image) else None
        arrays = self.images.float().cpu().movedim(-3, -1).numpy() if isinstance(self.images, Tensor) else self.images
        if arrays.ndim not in (4, 5) or arrays.shape[-1] != 3:
            return None
        return [VaeImageProcessor.numpy_to_pil(film) for film in (arrays if arrays.ndim == 5 else arrays[:, None])]


def _png(film: list[Image]) -> bytes:
    """Return a picture, or several as an animation of ten a second, as the bytes of a PNG file."""
    buffer = io.BytesIO()
    animated = {"save_all": True, "append_images": film[1:], "duration": 100} if len(film) > 1 else {}
    film[0].save(buffer, "PNG", **animated)
    return buffer.getvalue()


def _now() -> float:
    """Return the time when everything queued so far is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def versions() -> dict[str, str]:
    """Return the versions a result depends on; "unknown" for a package that is run without being installed."""
    found = {}
    for name in ("glassflows", "torch", "diffusers", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
