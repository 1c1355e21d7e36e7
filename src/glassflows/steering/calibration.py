"""Calibration: what rewards on the way tell of the final ones, and the scales that follow."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..caller import warn
from ..scheduler.hooks import Boundary
from ..smc import filter as smc
from .optional import needing_matplotlib
from .strategy import Decision, Generators, Outcome, is_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENOUGH = 4
"""Prompts, and particles of each, below which a calibration warns."""

_VERSION = 1  # of the files
_RESAMPLES = 1000
_SEED = 0  # of the resamples, so that the same rewards give the same errors
_EFFECTIVE = 0.5  # fraction of the final particles that `reward_scale` leaves effective
_COLUMNS = ("slopes", "slope_errors", "correlations", "correlation_errors")
_KEYS = tuple(name.removesuffix("s") for name in _COLUMNS)  # of a row in a file
_COUNTS = ("num_calls", "num_prompts", "num_particles", "look_ahead", "look_ahead_samples")
_PREVIEWS = ("preview_vae", "preview_size")


@dataclass(frozen=True, repr=False)
class Calibration:
    """What the rewards of denoised predictions tell of the final rewards.

    The best potential at a boundary is the value log E[exp(λ r(z)) | x_t], to first order in λ
    λ E[r(z) | x_t]. Its best linear estimate from the reward r(ẑ_k) of the denoised prediction is
    λ (a_k + b_k r(ẑ_k)): b_k is the slope of the regression of final rewards on r(ẑ_k) within
    prompts, and a_k is the same for all particles of a prompt. So the reward scale of boundary k is

        λ_k = b_k λ,     b_k = Σ_p Σ_i (x − x̄_p)(y − ȳ_p) / Σ_p Σ_i (x − x̄_p)²,

    x = r(ẑ_k), y = r(z). The last weighing pays the rest: the target is the same for any b_k. A
    slope b of standard error se counts as max(b, 0) · max(0, 1 − (se / b)²): of the form of the
    positive-part James-Stein estimate, of a single number the non-negative garrote. One that is
    negative, or no larger than its error, counts as 0.

    A calibration belongs to a pipeline, a reward, a number of transitions and of network calls.
    Later calls of a steerer do not refine it: particles that were resampled have been selected by
    the very rewards that the regression is on, and on a range so restricted slopes are biased.

    Args:
        slopes: b_k of the boundaries 1, 2, …, final reward per reward of ẑ, length total − 1.
        slope_errors: Their standard errors, by bootstrap over prompts.
        correlations: Of r(ẑ_k) and the final reward within prompts, between -1 and 1.
        correlation_errors: Their standard errors.
        reward_scale: λ that leaves half of the final particles effective in the median prompt, per
            unit of reward. A proposal: it is not applied.
        num_calls: Network calls of the run, 0 if unknown.
        num_prompts: P.
        num_particles: K.
        look_ahead: Calls of the excursions whose ends were scored, 0 for the predictions.
        look_ahead_samples: Number of such ends.
        preview_vae: Type of the autoencoder that predictions were decoded by; None for the
            pipeline's.
        preview_size: Size at which they were scored; None for that of the call.

    Raises:
        ValueError: if there are no slopes, not as many errors and correlations, what is no number,
            or a count that is not whole.

    Reference:
        Whiteley and Lee, Twisted particle filters, Annals of Statistics 42 (2014), 115, for values;
        Breiman, Better subset regression using the nonnegative garrote, Technometrics 37 (1995),
        373, for the shrinkage.
    """

    slopes: tuple[float, ...]
    slope_errors: tuple[float, ...]
    correlations: tuple[float, ...]
    correlation_errors: tuple[float, ...]
    reward_scale: float
    num_calls: int
    num_prompts: int
    num_particles: int
    look_ahead: int = 0
    look_ahead_samples: int = 1
    preview_vae: str | None = None
    preview_size: int | None = None

    def __post_init__(self) -> None:
        for name in _COLUMNS:
            values = tuple(getattr(self, name))
            if not values or len(values) != len(self.slopes) or not _are_finite(values):
                raise ValueError(
                    f"{name}: expected a finite number for each boundary after the first, "
                    f"{len(self.slopes)} as there are slopes and at least one, got {values}: "
                    "use what calibrate() returns"
                )
            object.__setattr__(self, name, tuple(map(float, values)))
        if not (_are_finite([self.reward_scale]) and self.reward_scale > 0):
            raise ValueError(
                f"reward_scale: expected a finite number above 0, got {self.reward_scale!r}: use "
                "what calibrate() returns"
            )
        for name in _COUNTS:
            value = getattr(self, name)
            if not (is_whole(value) and value >= 0):
                raise ValueError(
                    f"{name}: expected a whole number, got {value!r}: use what calibrate() returns"
                )

    @property
    def num_transitions(self) -> int:
        """Number of transitions of the run."""
        return len(self.slopes) + 1

    @property
    def transitions(self) -> tuple[int, ...]:
        """Numbers of the transitions at whose starts the slopes are, 1, …, total − 1.

        They count from 0, as in `SteeringResult`, so that they are the transitions done there.
        """
        return tuple(range(1, self.num_transitions))

    @property
    def shrunk(self) -> tuple[float, ...]:
        """The slopes as they count, length total − 1: max(b, 0) · max(0, 1 − (se / b)²)."""
        pairs = zip(self.slopes, self.slope_errors, strict=True)
        return tuple(b * (1 - (se / b) ** 2) if b > se else 0.0 for b, se in pairs)

    def schedule(self, reward_scale: float) -> tuple[float, ...]:
        """Return λ_1, …, λ_total = b_1 λ, …, b_{total−1} λ, λ, by the slopes as they count.

        Args:
            reward_scale: λ of the target.

        Raises:
            ValueError: if it is no finite number.
        """
        if not _are_finite([reward_scale]):
            raise ValueError(
                f"reward_scale: expected a finite number, got {reward_scale!r}: "
                f"{self.reward_scale:.3g} leaves half of the final particles effective"
            )
        return (*(b * reward_scale for b in self.shrunk), float(reward_scale))

    def check_run(self, at: Boundary) -> None:
        """Raise ValueError unless a run has the transitions and network calls of the calibration.

        Where either number of calls is 0, unknown, calls are not compared.
        """
        counts = (self.num_calls, at.num_calls)
        if at.total != self.num_transitions or (all(counts) and len(set(counts)) > 1):
            wanted = _run(self.num_transitions, at.num_calls and self.num_calls)
            raise ValueError(
                f"calibration: expected a run of {wanted}, as it was made of, got one of "
                f"{_run(at.total, self.num_calls and at.num_calls)}: calibrate again with the "
                "arguments of this call, or leave calibration out"
            )

    def check_scored(
        self,
        look_ahead: int,
        look_ahead_samples: int,
        preview_vae: str | None,
        preview_size: int | None,
    ) -> None:
        """Raise ValueError unless a steerer scores what the calibration was made of.

        Args:
            look_ahead: Calls of its excursions, 0 for none.
            look_ahead_samples: Number of them.
            preview_vae: Type of the autoencoder that decodes its predictions; None for the
                pipeline's.
            preview_size: Size at which they are scored; None for that of the call.
        """
        eyes, own = (preview_vae, preview_size), (self.preview_vae, self.preview_size)
        if eyes != own:
            raise ValueError(
                f"calibration: expected preview_vae={own[0]} and preview_size={own[1]}, as it was "
                f"made with, got {eyes[0]} and {eyes[1]}: calibrate again, or leave calibration out"
            )
        wanted = _looks(self.look_ahead, self.look_ahead_samples)
        got = _looks(look_ahead, look_ahead_samples)
        if wanted != got:
            raise ValueError(
                f"calibration: expected look_ahead={wanted[0]} with {wanted[1]} sample(s), as it "
                f"was made with, got {got[0]} with {got[1]}: calibrate again, or leave calibration "
                "out"
            )

    def __repr__(self) -> str:
        run = _run(self.num_transitions, self.num_calls)
        return f"Calibration({run}, {self.num_prompts} × {self.num_particles} particles)"

    def __str__(self) -> str:
        columns = [
            ["transitions done", *map(str, self.transitions)],
            ["slope", *_with_errors(self.slopes, self.slope_errors)],
            ["as it counts", *(f"{b:.2f}" for b in self.shrunk)],
            ["correlation", *_with_errors(self.correlations, self.correlation_errors)],
        ]
        for column in columns:
            width = max(map(len, column))
            column[:] = [text.rjust(width) for text in column]
        lines = [
            f"{_run(self.num_transitions, self.num_calls)}; {self.num_prompts} prompt(s) × "
            f"{self.num_particles} particles",
            *map("   ".join, zip(*columns, strict=True)),
            f"reward_scale={self.reward_scale:.3g} would leave half of the final particles "
            "effective",
        ]
        return "\n".join(lines)

    def plot(self) -> Figure:
        """Draw slopes and correlations with their standard errors, as a matplotlib figure.

        Notebooks show the figure that a cell ends in; `figure.savefig(path)` writes it. It is not
        one of pyplot's, and needs no closing.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        with needing_matplotlib():
            from .plotting import calibration_curves
        return calibration_curves(self)

    # ---- files -----------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """Return what is saved, as JSON can hold it: counts, and a row for each boundary."""
        columns = (self.transitions, *(getattr(self, name) for name in _COLUMNS))
        names = ("transition", *_KEYS)
        return {
            "calibration": _VERSION,
            "num_transitions": self.num_transitions,
            **{name: getattr(self, name) for name in (*_COUNTS, *_PREVIEWS)},
            "reward_scale": self.reward_scale,
            "boundaries": [
                dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)
            ],
        }

    def save(self, path: str | Path) -> Path:
        """Write the calibration to a JSON file, in the place of what it held; return its path."""
        path = Path(path).expanduser()
        text = json.dumps(self.record(), indent=1, allow_nan=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Return a calibration that was saved, equal to what it was.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file holds no calibration, or one of another version.
        """
        path = Path(path).expanduser()
        text = path.read_text(encoding="utf-8")
        try:
            return _of_record(json.loads(text))
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"load: expected a calibration of version {_VERSION} in {path}, got something else "
                f"({error}): name a file that Calibration.save wrote, or calibrate again"
            ) from error


def _of_record(record: Any) -> Calibration:
    if record["calibration"] != _VERSION:
        raise ValueError(f"version {record['calibration']}")
    rows = record["boundaries"]
    columns = {name: [row[key] for row in rows] for name, key in zip(_COLUMNS, _KEYS, strict=True)}
    counts = {name: record[name] for name in ("reward_scale", *_COUNTS)}
    previews = {name: record.get(name) for name in _PREVIEWS}  # earlier versions knew none
    return Calibration(**columns, **counts, **previews)


class Unmoved:
    """A strategy that scores every boundary, moves nothing, and notes what a calibration needs.

    Args:
        reward_scale: λ_r of the strategy that is calibrated.

    Attributes:
        boundaries: The boundaries at which it scored.
    """

    def __init__(self, reward_scale: float | None = None) -> None:
        self.reward_scale = 1.0 if reward_scale is None else reward_scale
        self.boundaries: list[Boundary] = []

    def scale(self, state: None, at: Boundary) -> Tensor:
        """Return λ_r, by which ends of excursions are averaged."""
        return torch.full((1, 1), self.reward_scale, dtype=torch.float64, device="cpu")

    def due(self, at: Boundary) -> bool:
        return True

    def init(self, groups: int, particles: int) -> None:
        return None

    def step(
        self, state: None, rewards: Tensor, at: Boundary, generators: Generators
    ) -> tuple[None, Decision]:
        self.boundaries.append(at)
        return None, Decision.keep(rewards)

    def finish(self, state: None, rewards: Tensor, total: int) -> Outcome:
        return Outcome.without_law(rewards)


# ---- estimates -----------------------------------------------------------------------------------


def calibrate_from(scored: Tensor, rewards: Tensor, num_calls: int = 0) -> Calibration:
    """Return the calibration that rewards of particles give which were never resampled.

    Standard errors are by bootstrap over prompts, with the factor √(P / (P − 1)) that makes the
    variance of a mean unbiased; over the particles if there is one prompt. At a boundary whose
    rewards do not differ within any prompt slope and correlation are 0.

    Args:
        scored: r(ẑ_k) of the boundaries 1, …, total − 1, shape (S, P, K), float64.
        rewards: Final rewards of the same particles, shape (P, K), float64.
        num_calls: Network calls of the run, 0 if unknown.

    Raises:
        ValueError: if nothing was scored, there is one particle of each prompt, or final rewards do
            not differ within any prompt, or by more than a float64 can hold.

    Reference:
        Efron, Bootstrap methods: another look at the jackknife, Annals of Statistics 7 (1979), 1.
    """
    check_transitions(len(scored) + 1)
    prompts, particles = rewards.shape
    check_particles(particles)
    if (rewards.amax(-1) == rewards.amin(-1)).all():
        raise ValueError(
            "calibrate: expected final rewards that differ among the particles of a prompt, got "
            f"{rewards.tolist()!s:.80}: there is nothing to fit slopes to; take other prompts, or "
            "a reward that tells their images apart"
        )
    (x, x_unit), (y, y_unit) = _in_units(scored, (1, 2)), _in_units(rewards, (0, 1))
    slopes, correlations = _fitted(*(moment.sum(-1) for moment in _moments(x, y)))
    number = particles if prompts == 1 else prompts
    unbiased = math.sqrt(number / (number - 1))
    errors = [unbiased * fits.std(-1) for fits in _fitted(*_drawn_again(x, y, number))]
    unit = y_unit / x_unit
    scale = float(smc.scale_for_ess(rewards, _EFFECTIVE).nanmedian())
    found = torch.stack([unit * slopes, unit * errors[0], correlations, errors[1]])
    if not (found.isfinite().all() and 0 < scale < math.inf):
        raise ValueError(
            "calibrate: expected rewards with differences between 1e-290 and 1e308, got "
            f"{rewards.tolist()!s:.80}: scale the reward"
        )
    columns: dict[str, Any] = dict(zip(_COLUMNS, found.tolist(), strict=True))
    return Calibration(
        **columns,
        reward_scale=scale,
        num_calls=num_calls,
        num_prompts=prompts,
        num_particles=particles,
    )


def _in_units(values: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return values less their mean within prompts, in units of the largest, and these units."""
    centred = _centred(values)
    largest = centred.abs().amax(dims, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)
    return centred / unit, unit.flatten()


def _centred(values: Tensor) -> Tensor:
    """Return values less their mean over particles; exactly 0 where they are all the same."""
    above = values - values[..., :1]
    return above - above.mean(-1, keepdim=True)


def _moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σ (x − x̄)², Σ (x − x̄)(y − ȳ) and Σ (y − ȳ)² over particles.

    Args:
        x: Shape (S, …, K).
        y: Shape (…, K).
    """
    x, y = _centred(x), _centred(y)
    return (x * x).sum(-1), (x * y).sum(-1), (y * y).sum(-1)


def _fitted(xx: Tensor, xy: Tensor, yy: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slope Σxy / Σxx and the correlation Σxy / √(Σxx Σyy); 0 where nothing differs."""
    slope, correlation = xy / xx, xy / (xx.sqrt() * yy.sqrt())
    return torch.where(xx > 0, slope, 0.0), torch.where((xx > 0) & (yy > 0), correlation, 0.0)


def _drawn_again(x: Tensor, y: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pooled moments of resamples of the prompts, of the particles of a single one.

    Args:
        x: Shape (S, P, K).
        y: Shape (P, K).
        number: P; K if there is one prompt.

    Returns:
        Σxx and Σxy, shape (S, resamples), and Σyy, shape (resamples,).
    """
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(number, (_RESAMPLES, number), generator=generator, device="cpu")
    if len(y) == 1:
        return _moments(x[:, 0][:, drawn], y[0][drawn])
    times = torch.zeros_like(drawn, dtype=y.dtype)
    times.scatter_add_(1, drawn, torch.ones_like(times))
    xx, xy, yy = (moment @ times.T for moment in _moments(x, y))
    return xx, xy, yy


# ---- words ---------------------------------------------------------------------------------------


def _looks(calls: int, samples: int) -> tuple[int, int]:
    """Return calls and number of excursions; of none it does not matter how many are asked for."""
    return calls, samples if calls else 1


def check_transitions(number: int) -> None:
    """Raise ValueError unless there is a transition whose start is scored: any after the first."""
    if number < 2:
        raise ValueError(
            "calibrate: expected a run of at least 2 transitions, since those after the first are "
            f"scored at their starts, got {number}: set num_transitions and num_inference_steps "
            "to 2 or more"
        )


def check_particles(number: int) -> None:
    """Raise ValueError unless there are particles to compare."""
    if number < 2:
        raise ValueError(
            f"calibrate: expected at least 2 particles of each prompt to compare, got {number}: "
            "set num_particles"
        )


def warn_if_few(calibration: Calibration) -> None:
    """Warn of a calibration of few prompts or particles, with its largest standard error."""
    prompts, particles = calibration.num_prompts, calibration.num_particles
    if min(prompts, particles) >= ENOUGH:
        return
    errors = calibration.slope_errors
    k = max(range(len(errors)), key=errors.__getitem__)
    warn(
        f"calibrate: expected at least {ENOUGH} prompts and {ENOUGH} particles of each, got "
        f"{prompts} and {particles}: slopes are as uncertain as {calibration.slopes[k]:.2g} ± "
        f"{errors[k]:.2g} (standard error) after {k + 1} of {calibration.num_transitions} "
        "transitions, and this error itself is uncertain: give more"
    )


def _with_errors(values: Sequence[float], errors: Sequence[float]) -> list[str]:
    return [f"{value:.2f} ± {error:.2f}" for value, error in zip(values, errors, strict=True)]


def _run(transitions: int, calls: int) -> str:
    return f"{transitions} transitions" + (f" and {calls} network calls" if calls else "")


def _are_finite(values: Any) -> bool:
    return all(isinstance(one, Real) and math.isfinite(one) for one in values)
