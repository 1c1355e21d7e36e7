"""FeynmanKacSteerer: a steerer with FeynmanKac, its options in one list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from ..host.decode import Decode
from ..host.microbatch import BATCH_SIZE_OPTIONS, MicroBatches
from ..host.team import Distributed
from ..signatures import passing_on
from ..smc.potentials import Potential
from .calibration import Calibration
from .feynman_kac import FeynmanKac, RewardScale
from .proposals import Twist
from .scorer import Reward
from .steerer import Steerer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FeynmanKacOptions(TypedDict, total=False):
    """The options of `FeynmanKac`; see there."""

    reward_scale: RewardScale | None
    potential: str | Potential
    resampling: str
    ess_threshold: float
    score_every: int
    start: float | None
    stop: float
    calibration: Calibration | None
    widths: Sequence[int] | None


class FeynmanKacSteerer(Steerer):
    """Sample a pipeline from p(z) exp(λ_r r(z)): a `Steerer` with `FeynmanKac`.

    Args:
        pipe, reward, num_particles, num_transitions, decode: As in `Steerer`.
        previews, preview_vae, preview_size, twist, look_ahead: As in `Steerer`.
        look_ahead_samples, distributed: As in `Steerer`.
        particle_batch_size: Particles the networks see at a time, inside the pipeline's own loop;
            None for all.
        decode_batch_size: Latents decoded at a time, on the way and in the pipeline at the end;
            None for all.
        reward_batch_size: Samples scored at a time; None for all.
        options: The options of `FeynmanKac`: `reward_scale`, `potential`, `resampling`,
            `ess_threshold`, `score_every`, `start`, `stop`, `calibration`, `widths`.

    Raises:
        ValueError: as `Steerer`, `FeynmanKac` and `MicroBatches` do.
        TypeError: for an option that none of them has.

    Reference:
        Singhal et al., arXiv:2501.06848; Holderrieth et al., arXiv:2509.25170, section 5.
    """

    def __init__(
        self,
        pipe: Any,
        reward: Reward,
        num_particles: int = 8,
        *,
        num_transitions: int | None = None,
        decode: Decode | Literal["latents"] | None = None,
        particle_batch_size: int | None = None,
        decode_batch_size: int | None = None,
        reward_batch_size: int | None = None,
        previews: bool = False,
        preview_vae: Any = None,
        preview_size: int | None = None,
        twist: float | Twist = 0.0,
        look_ahead: int = 0,
        look_ahead_samples: int = 1,
        distributed: Distributed = "auto",
        **options: Unpack[FeynmanKacOptions],
    ) -> None:
        super().__init__(
            pipe,
            reward,
            FeynmanKac(**options),
            num_particles,
            num_transitions=num_transitions,
            decode=decode,
            batches=MicroBatches(particle_batch_size, decode_batch_size, reward_batch_size),
            previews=previews,
            preview_vae=preview_vae,
            preview_size=preview_size,
            twist=twist,
            look_ahead=look_ahead,
            look_ahead_samples=look_ahead_samples,
            distributed=distributed,
        )


def _field_of(part: str, name: str) -> property:
    """Return an attribute of a steerer that reads a field of one of its parts, and sets it anew."""

    def read(steerer: Steerer) -> Any:
        return getattr(getattr(steerer, part), name)

    def write(steerer: Steerer, value: Any) -> None:
        as_given = "_strategy" if part == "strategy" else part
        setattr(steerer, part, replace(getattr(steerer, as_given), **{name: value}))

    return property(read, write)


for _field in fields(FeynmanKac):
    setattr(FeynmanKacSteerer, _field.name, _field_of("strategy", _field.name))
for _name, _option in BATCH_SIZE_OPTIONS.items():
    setattr(FeynmanKacSteerer, _option, _field_of("batches", _name))
FeynmanKacSteerer.__init__.__signature__ = passing_on(FeynmanKacSteerer.__init__, FeynmanKac)  # type: ignore[attr-defined]
