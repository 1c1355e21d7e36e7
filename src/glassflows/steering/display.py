"""What a notebook shows of a result: small pictures, scores, and what the call cost.

A film is the list of frames of a video, or of one image.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import features
from PIL.Image import Image, fromarray
from torch import Tensor

from ..scheduler.hooks import Boundary
from .record import as_array

if TYPE_CHECKING:
    from .result import SteeringResult

_PIXELS = 8 * 256**2
"""Of all pictures together: some 400 kB of noise, the worst case, and far less of images."""

_FRAMES = 12
_SHOWN = 4  # particles of each prompt while a run is on


class Film(list[Image]):
    """The frames of a video; an image is a film of one frame."""

    def png(self) -> bytes:
        """Return the bytes of a PNG file; several frames make an animation, ten a second."""
        buffer = io.BytesIO()
        animated = {"save_all": True, "append_images": self[1:], "duration": 100}
        self[0].save(buffer, "PNG", **(animated if len(self) > 1 else {}))
        return buffer.getvalue()

    def thumbnail(self, side: int) -> tuple[str, bytes]:
        """Return a small picture that browsers show, as its type and bytes.

        A video becomes an animation of a dozen frames at the most, or its middle frame where PIL
        cannot write WebP.

        Args:
            side: Length of the longer side, pixels; what is smaller already is left as it is.
        """
        step = math.ceil(len(self) / _FRAMES)
        animated = len(self) > 1 and features.check("webp")
        frames = self[::step] if animated else [self[len(self) // 2]]
        frames = [frame.convert("RGB") for frame in frames]
        for frame in frames:
            frame.thumbnail((side, side))
        buffer = io.BytesIO()
        if animated:
            more: dict[str, Any] = {"append_images": frames[1:], "duration": 100 * step, "loop": 0}
            frames[0].save(buffer, "WEBP", save_all=True, quality=70, **more)
            return "webp", buffer.getvalue()
        frames[0].save(buffer, "JPEG", quality=85)
        return "jpeg", buffer.getvalue()


class Live:
    """Shows in a notebook what is predicted as it is scored, the best of each prompt first.

    Args:
        prompts: The prompt of each group; None where only embeddings were given.

    Raises:
        ValueError: outside of a notebook.
    """

    def __init__(self, prompts: Sequence[Any]) -> None:
        self.prompts = prompts
        self._handle: Any = None
        try:
            from IPython import get_ipython

            shell = get_ipython()
        except ImportError:
            shell = None
        if getattr(shell, "kernel", None) is None:  # a terminal has none
            raise ValueError(
                "display: expected a notebook, got none to show pictures in: leave it out, or take "
                "previews=True, which keeps them"
            )

    def __call__(self, at: Boundary, seen: Tensor, rewards: Tensor, worth: Tensor) -> None:
        """Show a scoring in the place of the one before.

        Args:
            at: The boundary.
            seen: What the reward saw, bytes, shape (P · W, …); of latents and sound nothing but
                their rewards is shown.
            rewards: Shape (P, W).
            worth: Rewards as the strategy counts them, higher for better, shape (P, W).
        """
        from IPython.display import HTML, display

        content = HTML(self.page(at, seen, rewards, worth))
        if self._handle is None:
            self._handle = display(content, display_id=True)
        else:
            self._handle.update(content)

    def page(self, at: Boundary, seen: Tensor, rewards: Tensor, worth: Tensor) -> str:
        """Return a scoring as HTML."""
        parts = [f"<p>transition {at.index + 1} of {at.total}</p>"]
        best = worth.argsort(dim=1, descending=True, stable=True)[:, :_SHOWN]
        for prompt, slots, scores, some in zip(
            self.prompts, best, rewards, seen.unflatten(0, rewards.shape), strict=True
        ):
            parts.append(f"<p>{html.escape(str(prompt or ''))}</p>")
            written = labels(scores[slots].tolist())
            for slot, score in zip(slots.tolist(), written, strict=True):
                picture = as_picture(some[slot])
                if not isinstance(picture, list | Image):
                    parts.append(f"{score} ")
                    continue
                film = Film(picture if isinstance(picture, list) else [picture])
                parts.append(_figure(film, 160, [score]))
        return "".join(parts)


def as_picture(image: Tensor) -> Any:
    """Return a PIL image of bytes (3, H, W), a list of them of a video; an array of other data."""
    if image.dtype != torch.uint8:
        return as_array(image)
    if image.ndim == 4:
        return [as_picture(frame) for frame in image]
    return fromarray(image.movedim(0, -1).squeeze(-1).contiguous().numpy())


def labels(scores: Sequence[float]) -> list[str]:
    """Return scores as texts, with as many digits as tell apart what differs.

    Three digits at least, and three of the range from the lowest to the highest.
    """
    size, spread = max(map(abs, scores)), max(scores) - min(scores)
    digits = 3
    if spread > 0:
        digits += math.floor(math.log10(size)) - math.floor(math.log10(spread))
    return [f"{score:.{min(digits, 17)}g}" for score in scores]


def as_html(result: SteeringResult) -> str:
    """Return the images or videos of a result with their rewards, and a line on the call."""
    films, rewards = result.films(), captions(result)
    line = html.escape(summary(result))
    if films is None:
        return f"<pre>rewards {', '.join(map('; '.join, rewards))}\n{line}</pre>"
    titles = [prompt for prompt in result.prompts if prompt is not None]
    each = result.order.shape[1]
    animated = len(films[0]) > 1
    number = len(films) * (min(len(films[0]), _FRAMES) / 3 if animated else 1)
    side = min(256, max(48, math.isqrt(int(_PIXELS / number))))
    cells = [f"<p>{line}</p>"]
    for i, (film, reward) in enumerate(zip(films, rewards, strict=True)):
        if i % each == 0 and titles:
            cells.append(f"<p>{html.escape(str(titles[i // each]))}</p>")
        cells.append(_figure(film, side, reward))
    return "".join(cells)


def captions(result: SteeringResult) -> list[list[str]]:
    """Return the reward of each image as a text, and what a composed reward is made of."""
    rewards = labels(result.image_rewards.tolist())
    if len(result.parts) < 2:
        return [[reward] for reward in rewards]
    own = result.order.flatten() >= 0  # of ends of excursions the parts are not known
    parts = {
        name: labels(part[-1].gather(1, result.order.clamp(min=0)).flatten().tolist())
        for name, part in result.parts.items()
    }
    return [
        [reward, *(f"{name} {texts[i]}" for name, texts in parts.items() if own[i])]
        for i, reward in enumerate(rewards)
    ]


def _figure(film: Film, side: int, lines: Sequence[str]) -> str:
    style = "display:inline-block;margin:4px"
    caption = f"<figcaption>{'<br>'.join(map(html.escape, lines))}</figcaption>"
    return f'<figure style="{style}">{image_tag(film, side)}{caption}</figure>'


def image_tag(film: Film, side: int) -> str:
    """Return a film as an HTML image, its longer side at the most `side` pixels."""
    kind, picture = film.thumbnail(side)
    source = base64.b64encode(picture).decode()
    return f'<img src="data:image/{kind};base64,{source}" style="min-width:96px;max-width:256px">'


def variety(lineages: float, diversity: float) -> str:
    """Return in a few words how different particles are; a diversity of NaN is left out."""
    words = f"{lineages:.3g} lineage" + ("" if lineages == 1 else "s")
    return words if math.isnan(diversity) else f"{words}, diversity {diversity:.2g}"


def summary(result: SteeringResult) -> str:
    """Return in a line what a call drew, how its weights went and what it cost.

    Effective sample sizes, lineages and diversity are means over prompts. Of a population that
    shrinks all its numbers of particles are named.
    """
    prompts, particles = len(result.rewards), _arrows(result.widths)
    best = labels([float(row[slot]) for row, slot in zip(result.rewards, result.best, strict=True)])
    parts = [
        f"{result.strategy}: {_counted(prompts, 'prompt')} × {_counted(particles, 'particle')}, "
        f"best reward {', '.join(best[:4])}{' …' if len(best) > 4 else ''}"
    ]
    if len(result.ess):
        sizes = " → ".join(f"{size:.1f}" for size in result.ess.mean(1).tolist())
        parts.append(f"ESS {sizes} of {_arrows(result.widths[:-1])}")
    lineages = float(result.lineages.double().mean())
    parts.append(variety(lineages, float(result.diversity.mean())))
    if result.interrupted:
        parts.append("interrupted")
    return "; ".join([*parts, str(result.ledger)])


def _arrows(widths: Sequence[int]) -> str:
    """Return numbers of particles over time, each once; they never grow."""
    return " → ".join(map(str, dict.fromkeys(widths)))


def _counted(number: int | str, what: str) -> str:
    return f"{number} {what}" + ("" if str(number) == "1" else "s")
