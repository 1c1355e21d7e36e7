"""What a steered call returns: images, how they came about, and what they cost.

A particle is one sample of a prompt on its way to an image. At a scoring, a reward scores the
denoised predictions of all particles.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL.Image import Image
from torch import Tensor

from ..host.ledger import Ledger
from . import record
from .display import Film, as_html, summary
from .diversity import num_lineages
from .optional import needing_matplotlib
from .samples import Samples, samples_of
from .strategy import worth
from .trajectory import Trajectories

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class SteeringResult:
    """What a steered call returns.

    The call had P prompts with K particles each (a group), and S scorings. W particles of each
    prompt lived to the end: K, unless the population shrank (`FeynmanKac(widths=…)`, `Halving`).
    Those that live are always the first slots. The call returned n samples of each prompt.

    The best particle is the best one for the target p(z) exp(λ_r r(z)): that of the highest reward,
    of the lowest where λ_r is negative.

    Two results are equal if all that they hold is; seconds do not count.

    Args:
        images: The P · n images (or videos, or waveforms), prompt-major, in the pipeline's own
            `output_type`; best first within each prompt, or in the order drawn for
            `select="sample"`.
        rewards: Reward of each final particle, in slot order, shape (P, W), float64.
        log_weights: Final log-weights, normalised within each prompt, in slot order, shape (P, W).
        ancestors: Parent slots within the prompt's group at each scoring, shape (S, P, K), int64;
            −1 in slots that hold no particle after that scoring.
        resampled: Which groups were resampled at each scoring, shape (S, P), bool.
        ess: Effective sample size before resampling at each scoring, shape (S, P).
        scored: Rewards of the denoised predictions at each scoring, before resampling, shape
            (S, P, K), float64; NaN in slots that held no particle before that scoring, which were
            not scored.
        transitions: Number of the transition at whose start each scoring took place, length S.
        log_evidence: Estimate of log E[exp(λ_r r)] over the model's own samples, shape (P,).
        strategy: Name of the strategy that chose the ancestors. A strategy that samples no known
            law (`BeamSearch`) has uniform weights; evidence and scale are NaN.
        reward_scale: λ_r of the final weighing, shape (P,); the run chose it if it was "auto".
        order: Slot of each returned image, shape (P, n): `images[p * n + i]` came from slot
            `order[p, i]`; −1 stands for the best end of an excursion (`select="best_seen"`).
        seen: Reward of the best end of an excursion of each prompt, shape (P,), float64; None
            where nobody looked ahead.
        diversity: Mean distance of two of the W final samples of each prompt, shape (P,), float64:
            the root of their mean squared difference, as the reward sees them (images in [0, 1],
            latents of any range), whether returned or not. 0 for copies and for W = 1.
        interrupted: Whether `pipe._interrupt` ended the run before its last step. The images, or
            the latents for `output_type="latent"`, and their rewards are then those of the last
            denoised predictions, decoded as for the reward, without a watermark. Before the first
            step there are none, and past a safety checker of the pipeline none goes: there the
            images are the pipeline's own, still noisy.
        others: Other outputs of the pipeline by name, in rows like those of `images`: sound,
            verdicts on safety. An interrupted run leaves them as the pipeline made them.
        ledger: What the call cost.
        previews: Denoised predictions at each scoring as the reward saw them, shape
            (S, P · K, …), uint8 (latents and sound as floats), 0 where `scored` is NaN; None unless
            asked for.
        recipe: What reproduces the call: versions, options, arguments.
        latents: What each of `images` was decoded from, the clean latents as the scheduler holds
            them, shape (P · n, *event), on the CPU; None where an interrupted run took no step.
            What inpainting keeps is put back; what a callback makes of the last latents is not
            seen.
        trajectories: The transitions that the particles of `images` took; None unless asked for.
        parts: The scores that a composed reward (`Sum`, `Product`, …) is made of, by their names,
            shape (S + 1, P, K) each, float64: at each scoring, and last those of the final samples.
            NaN in slots that held no particle. Where excursions were scored they are means over
            their ends. Empty of any other reward.
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
    seen: Tensor | None
    diversity: Tensor
    interrupted: bool
    others: dict[str, Any]
    ledger: Ledger
    previews: Tensor | None
    recipe: dict[str, Any]
    latents: Tensor | None = None
    trajectories: Trajectories | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def prompts(self) -> tuple[str | None, ...]:
        """The P prompts; None where only embeddings were given."""
        given, number = self.recipe["call"].get("prompt"), len(self.rewards)
        if given is None or isinstance(given, str):
            return (given,) * number
        return tuple(given)

    @property
    def frames(self) -> Any:
        """The `images`, by the name that video pipelines give them."""
        return self.images

    @property
    def audios(self) -> Any:
        """The sound beside a video; else the `images`, by the name of audio pipelines for them."""
        return self.others.get("audio", self.images)

    @property
    def best(self) -> Tensor:
        """The slot of the best final particle of each prompt, shape (P,)."""
        return worth(self.rewards, self.reward_scale).argmax(1)

    @property
    def image_rewards(self) -> Tensor:
        """The reward of each of `images`, shape (P · n,), in their order."""
        final = self.rewards.gather(1, self.order.clamp(min=0))
        if self.seen is not None:
            final = torch.where(self.order < 0, self.seen[:, None], final)
        return final.flatten()

    @property
    def widths(self) -> tuple[int, ...]:
        """How many particles of each prompt lived up to each scoring, then to the end, S + 1."""
        scored = self.scored[:, 0].isfinite().sum(1).tolist()
        return (*scored, self.rewards.shape[1])

    @property
    def lineages(self) -> Tensor:
        """How many particles of the first scoring have final descendants, shape (P,), int64.

        K of each prompt if nothing was resampled, or no scoring took place; 1 if all final
        particles descend from the same one.
        """
        return num_lineages(self.ancestors)

    def lineage(self, prompt: int = 0, slot: int | None = None) -> list[int]:
        """Return the slots of a final particle's ancestors at each scoring, then its own slot.

        Args:
            prompt: Index of the prompt.
            slot: The final slot; the best if None.
        """
        slots = [int(self.best[prompt]) if slot is None else slot]
        for ancestors in self.ancestors[:, prompt].flip(0):
            slots.append(int(ancestors[slots[-1]]))
        return slots[::-1]

    def samples(self) -> Samples:
        """Return the samples as rows for training, one for each of `images`.

        Raises:
            ValueError: if there are no latents.
        """
        return samples_of(self)

    def plot(self, prompt: int = 0) -> Figure:
        """Draw the genealogy of a prompt's particles, ESS and rewards, as a matplotlib figure.

        Notebooks show the figure that a cell ends in; `figure.savefig(path)` writes it. It is not
        one of pyplot's, and needs no closing.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        with needing_matplotlib():
            from .plotting import genealogy
        return genealogy(self, prompt)

    def save(self, folder: str | Path) -> Path:
        """Write all that the result holds; return the folder.

        `steering.json` has all numbers and the recipe; what is not finite is written "Infinity",
        "-Infinity" or "NaN". Images are PNG files, and videos animated ones. What an image rounds,
        arrays, tensors, latents and sound, is in `samples.npy`; previews and other outputs are in
        `arrays.npz`. A result that was saved in the folder before is replaced.

        Raises:
            FileExistsError: if the folder holds a file of such a name that no result put there.
        """
        return record.save(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> SteeringResult:
        """Return a result that was saved, equal to what it was.

        Tensors are on the CPU. Of `others`, an object that is neither data nor an image is replaced
        by the name of its type. A result that was saved before there was a `diversity` has NaN.

        Raises:
            FileNotFoundError: if no result was saved in the folder.
            ValueError: if it was saved by a version that could not load.
        """
        return cls(**record.load(folder))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SteeringResult):
            return NotImplemented
        return all(_same(getattr(self, one.name), getattr(other, one.name)) for one in fields(self))

    def __repr__(self) -> str:
        return f"SteeringResult({summary(self)})"

    def _repr_html_(self) -> str:
        """Return the images or videos, small, with their rewards as HTML, for notebooks."""
        return as_html(self)

    def films(self) -> list[Film] | None:
        """Return the frames of each image or video; None for latents and sound."""
        images = self.images
        if isinstance(images, list):
            films = [Film(film if isinstance(film, list) else [film]) for film in images]
            return films if films and isinstance(films[0][0], Image) else None
        if images.ndim not in (4, 5):
            return None
        is_tensor = isinstance(images, Tensor)
        arrays = images.float().cpu().movedim(-3, -1).numpy() if is_tensor else np.asarray(images)
        if arrays.shape[-1] != 3:
            return None
        videos = arrays if arrays.ndim == 5 else arrays[:, None]
        return [Film(VaeImageProcessor.numpy_to_pil(video)) for video in videos]


def _same(one: Any, other: Any) -> bool:
    """Return whether two values are equal in content, wherever they lie; NaN equals NaN."""
    if isinstance(one, Tensor | np.ndarray) and type(one) is type(other):
        if isinstance(one, Tensor):
            one, other = one.detach().cpu(), other.detach().cpu()
        alike = one.shape == other.shape and one.dtype == other.dtype
        return alike and bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, Image) and isinstance(other, Image):
        alike = one.mode == other.mode and one.size == other.size
        return alike and one.tobytes() == other.tobytes()
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        alike = len(one) == len(other) and isinstance(one, list) == isinstance(other, list)
        return alike and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Tensor | np.ndarray) or isinstance(other, Tensor | np.ndarray):
        return False
    return bool(one == other) or bool(one != one and other != other)
