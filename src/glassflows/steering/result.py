"""What a steered call returns: images, how they came about, and what they cost.

A particle is one sample of a prompt on its way to an image. At a scoring, a reward scores the
denoised predictions of all particles. A film is the list of frames of a video, or of one image.
"""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.image_processor import VaeImageProcessor
from PIL.Image import Image
from torch import Tensor

from ..host.ledger import Ledger
from . import record


class Film(list[Image]):
    """The frames of a video; an image is a film of one frame."""

    def png(self) -> bytes:
        """Return the bytes of a PNG file; several frames make an animation, ten a second."""
        buffer = io.BytesIO()
        animated = {"save_all": True, "append_images": self[1:], "duration": 100}
        self[0].save(buffer, "PNG", **(animated if len(self) > 1 else {}))
        return buffer.getvalue()


@dataclass(frozen=True)
class SteeringResult:
    """What a steered call returns.

    The call had P prompts with K particles each (a group), and S scorings. It returned n samples of
    each prompt.

    Args:
        images: The P · n images (or videos, or waveforms), prompt-major, in the pipeline's own
            `output_type`; best first within each prompt, or in the order drawn for
            `select="sample"`.
        rewards: Reward of each final particle, in slot order, shape (P, K), float64.
        log_weights: Final log-weights, normalised within each prompt, in slot order, shape (P, K).
        ancestors: Parent slots within the prompt's group at each scoring, shape (S, P, K), int64.
        resampled: Which groups were resampled at each scoring, shape (S, P), bool.
        ess: Effective sample size before resampling at each scoring, shape (S, P).
        scored: Rewards of the denoised predictions at each scoring, before resampling, shape
            (S, P, K), float64.
        transitions: Number of the transition at whose start each scoring took place, length S.
        log_evidence: Estimate of log E[exp(λ_r r)] over the model's own samples, shape (P,).
        strategy: Name of the strategy that chose the ancestors. A strategy that samples no known
            law (`BeamSearch`) has uniform weights; evidence and scale are NaN.
        reward_scale: λ_r of the final weighing, shape (P,); the run chose it if it was "auto".
        order: Slot of each returned image, shape (P, n): `images[p * n + i]` came from slot
            `order[p, i]`.
        interrupted: Whether `pipe._interrupt` ended the run. The images are then denoised as far as
            the run came.
        others: Other outputs of the pipeline by name, in rows like those of `images`: sound,
            verdicts on safety.
        ledger: What the call cost.
        previews: Denoised predictions at each scoring as the reward saw them, shape
            (S, P · K, …), uint8 (latents and sound as floats); None unless asked for.
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
    strategy: str
    reward_scale: Tensor
    order: Tensor
    interrupted: bool
    others: dict[str, Any]
    ledger: Ledger
    previews: Tensor | None
    recipe: dict[str, Any]

    @property
    def frames(self) -> Any:
        """The `images`, by the name that video pipelines give them."""
        return self.images

    @property
    def audios(self) -> Any:
        """The sound beside a video; else the `images`, by the name of audio pipelines for them."""
        return self.others.get("audio", self.images)

    @property
    def image_rewards(self) -> Tensor:
        """The reward of each of `images`, shape (P · n,), in their order."""
        return self.rewards.gather(1, self.order).flatten()

    def lineage(self, prompt: int = 0, slot: int | None = None) -> list[int]:
        """Return the slots of a final particle's ancestors at each scoring, then its own slot.

        Args:
            prompt: Index of the prompt.
            slot: The final slot; the best if None.
        """
        slots = [int(self.rewards[prompt].argmax()) if slot is None else slot]
        for ancestors in self.ancestors[:, prompt].flip(0):
            slots.append(int(ancestors[slots[-1]]))
        return slots[::-1]

    def plot(self, prompt: int = 0) -> Any:
        """Draw the genealogy of a prompt's particles, ESS and rewards, as a matplotlib figure."""
        from .plotting import genealogy  # matplotlib is an extra

        return genealogy(self, prompt)

    def save(self, folder: str | Path) -> Path:
        """Write the images, all numbers and the recipe; return the folder.

        Images are PNG files, and videos animated PNG files. Latents and sound are in `samples.npy`.
        Rewards, weights, ancestors, ledger and recipe are in `steering.json`.
        """
        return record.save(self, folder)

    def _repr_html_(self) -> str:
        """Return the images or videos and their rewards as HTML, for notebooks."""
        films = self.films()
        if films is None:
            return f"<pre>{self.rewards.tolist()}</pre>"
        prompts = self.recipe["call"].get("prompt")
        titles = [prompts] if isinstance(prompts, str) else prompts or []
        cells, each = [], self.order.shape[1]
        for i, (film, reward) in enumerate(zip(films, self.image_rewards.tolist(), strict=True)):
            if i % each == 0 and titles:
                cells.append(f"<p>{html.escape(str(titles[i // each]))}</p>")
            source = base64.b64encode(film.png()).decode()
            cells.append(
                f'<figure style="display:inline-block;margin:4px">'
                f'<img src="data:image/png;base64,{source}" style="max-width:256px">'
                f"<figcaption>{reward:.4g}</figcaption></figure>"
            )
        return "".join(cells)

    def films(self) -> list[Film] | None:
        """Return the frames of each image or video; None for latents and sound."""
        images = self.images
        if isinstance(images, list):
            films = [Film(film if isinstance(film, list) else [film]) for film in images]
            return films if films and isinstance(films[0][0], Image) else None
        is_tensor = isinstance(images, Tensor)
        arrays = images.float().cpu().movedim(-3, -1).numpy() if is_tensor else np.asarray(images)
        if arrays.ndim not in (4, 5) or arrays.shape[-1] != 3:
            return None
        videos = arrays if arrays.ndim == 5 else arrays[:, None]
        return [Film(VaeImageProcessor.numpy_to_pil(video)) for video in videos]
