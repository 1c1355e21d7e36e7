"""Where the scheduler's noise comes from: `pipe(generator=g)` reproduces in every pipeline.

A source holds a generator that it was given, or one generator per row, a sample of the batch. A
stream is a tuple of numbers that tells the copies of a source apart.

A row is known by what its caller drew for it: the noise that the host added to an image, else its
initial latents. Latents that are computed differ in the last bits from machine to machine, and so
a *fingerprint* is taken of them that rounding does not change: where their largest values lie.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..flow.noise import NoiseLevel
from .supported import NeedsNoiseScale

Generators = torch.Generator | list[torch.Generator]


class NoiseSource:
    """A source of noise: a generator given at the draw, else one given before, else one per row.

    The generator of a row is seeded by the row's own noise or latents. It thus follows the
    generator that the pipeline drew those from, and row i gets the same noise in a batch as alone.
    Its draws are float32 numbers on the CPU, whatever the defaults of torch are. A deep copy draws
    an independent stream.
    """

    def __init__(self) -> None:
        self.generator: Generators | None = None
        self._rows: list[torch.Generator] = []
        self._aside: list[torch.Generator] = []
        self._added: tuple[list[bytes], Tensor] | None = None
        self._stream: tuple[int, ...] = ()
        self._num_copies = 0

    def reset(self) -> None:
        """Forget the rows of the last run.

        Copies are numbered anew, so that a repeated run repeats them.
        """
        self._rows, self._aside, self._added, self._num_copies = [], [], None, 0

    def added(self, noise: Tensor, noised: Tensor) -> None:
        """Take note of noise that the host adds to clean samples before a run begins (img2img).

        Args:
            noise: The noise, shape (N, *event).
            noised: The noisy samples, with which the run may begin, in whatever order of elements.
        """
        if not noise.is_meta:
            self._added = _fingerprints(noise), _moments(noised)

    def begin(self, sample: Tensor, generator: Generators | None) -> None:
        """Seed the rows of a run, if no other source is given.

        Args:
            sample: Their initial latents, shape (N, *event).
            generator: The source given to the first step.
        """
        if generator is not None or self.generator is not None:
            return
        seeds = self.seeds(sample, self._stream)
        self._rows = [torch.Generator().manual_seed(seed) for seed in seeds]

    def begin_aside(self, sample: Tensor) -> None:
        """Seed the rows of a run for draws that leave all others as they are."""
        seeds = self.seeds(sample, (*self._stream, *_ASIDE))
        self._aside = [torch.Generator().manual_seed(seed) for seed in seeds]

    def seeds(self, sample: Tensor, stream: tuple[int, ...]) -> list[int]:
        """Return one seed per row of a run, which no other row and no rounding changes.

        Args:
            sample: The initial latents, shape (N, *event).
            stream: Tells apart what the seeds are for.
        """
        if self._added is not None:
            fingerprints, moments = self._added
            begins = _moments(sample)
            if begins.shape == moments.shape and torch.allclose(begins, moments, 1e-2, 1e-4):
                return _seeds(fingerprints, stream)
        return _seeds(_fingerprints(sample), stream)

    def draw(self, like: Tensor, generator: Generators | None) -> Tensor:
        """Return standard normal noise of the shape and on the device of `like`, float32."""
        source = generator if generator is not None else self.generator
        if source is not None:
            if isinstance(source, list) and len(source) != len(like):
                raise ValueError(
                    f"generator: expected one or a list of one per row, {len(like)}, got a list of "
                    f"{len(source)}: pass a single generator"
                )
            return randn_tensor(
                like.shape, generator=source, device=like.device, dtype=torch.float32
            )
        return _of_rows(like, self._rows)

    def draw_aside(self, like: Tensor) -> Tensor:
        """Return noise as `draw` does, from generators of their own."""
        return _of_rows(like, self._aside)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoiseSource:
        self._num_copies += 1
        new = copy.copy(self)
        new._stream, new._num_copies = (*self._stream, self._num_copies), 0
        new.generator = _forked(self.generator, new._stream)
        new._rows = _forked(self._rows, new._stream)
        new._aside = _forked(self._aside, new._stream)
        return new


_ASIDE = (-2,)
"""The stream of random numbers that excursions draw."""


def _of_rows(like: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Return standard normal noise, a generator for each row, drawn on the CPU."""
    shape, dtype = like.shape[1:], torch.float32
    rows = [torch.randn(shape, generator=row, dtype=dtype, device="cpu") for row in generators]
    noise = torch.stack(rows)
    if like.device.type == "cuda":
        noise = noise.pin_memory()  # so that the copy waits for nothing
    return noise.to(like.device, non_blocking=True)


def check_initial_noise(sample: Tensor, level: NoiseLevel) -> None:
    """Check the scale of the initial latents of a run, if they are pure noise.

    Raises:
        NeedsNoiseScale: if the latents are larger than the noise level says.
    """
    if level.alpha > 0 or sample.is_meta or sample.numel() < 64:
        return
    spread = float(sample.detach().float().std())
    if spread > 1.5 * level.sigma:
        raise NeedsNoiseScale(
            f"step: expected initial noise of standard deviation {level.sigma:g}, "
            f"got {spread:.3g}: scale latents that are passed, or, where the pipeline begins with "
            "larger noise (PRX-Pixel: pipe.config.noise_scale), pass noise_scale to GLASSScheduler"
        )


def _seeds(fingerprints: list[bytes], stream: tuple[int, ...]) -> list[int]:
    """Return a hash of each fingerprint, of the number of its equals before it, and of a stream."""
    seen: Counter[bytes] = Counter()
    seeds = []
    for fingerprint in fingerprints:
        digest = hashlib.blake2b(fingerprint, digest_size=16).digest()
        seeds.append(_seed(digest, seen[digest], *stream))
        seen[digest] += 1
    return seeds


_BLOCKS = 16
_FEW = 4 * _BLOCKS
"""Rows of fewer elements are too small to be told apart by where their largest values lie."""


def _fingerprints(sample: Tensor) -> list[bytes]:
    """Return what tells the rows of a sample apart.

    Element i of a row belongs to block i modulo 16, and the fingerprint is the place of the largest
    element of each block. Rounding by 1e-6 changes it in less than one run of 10⁴.
    """
    rows = sample.detach().to("cpu", torch.float32).reshape(len(sample), -1)
    size = rows.shape[1] // _BLOCKS
    if rows.shape[1] < _FEW:
        return [row.numpy().tobytes() for row in rows.contiguous()]
    places = rows[:, : size * _BLOCKS].view(len(rows), size, _BLOCKS).argmax(1)
    return [row.numpy().tobytes() for row in places]


def _moments(sample: Tensor) -> Tensor:
    """Return mean and mean square of each row, float64, shape (N, 2)."""
    rows = sample.detach().to("cpu", torch.float32).reshape(len(sample), -1).double()
    return torch.stack([rows.mean(1), rows.square().mean(1)], 1)


def _forked(generators: Any, stream: tuple[int, ...]) -> Any:
    """Return generators like these, with independent streams."""
    if generators is None:
        return None
    if isinstance(generators, list):
        return [_forked(generator, stream) for generator in generators]
    seed = _seed(generators.get_state().numpy().tobytes(), *stream)
    return torch.Generator(generators.device).manual_seed(seed)


def _seed(digest: bytes, *numbers: int) -> int:
    digest = hashlib.blake2b(digest + repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
