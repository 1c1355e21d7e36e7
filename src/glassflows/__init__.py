"""GLASS Flows for diffusers: stochastic transitions at ODE cost, and steering by any reward."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffusers import SchedulerMixin  # the pipeline loader looks for the base class here

from .flow.noise import RectifiedFlow, VarianceExploding, VariancePreserving
from .flow.sample import sample, sample_posterior, sample_transition, value
from .flow.solver import Solver
from .flow.transition import renewal
from .scheduler import GLASSFlowMatchScheduler, GLASSScheduler

if TYPE_CHECKING:
    from . import rewards
    from .host.ledger import Ledger
    from .host.microbatch import MicroBatches
    from .steering import (
        BeamSearch,
        BestOfN,
        Calibration,
        Comparison,
        FeynmanKac,
        FeynmanKacSteerer,
        Halving,
        Rollouts,
        Samples,
        Steerer,
        SteeringResult,
        Trajectories,
        Twist,
        compare,
    )

__version__ = "0.2.0"

# so that model_index.json reads ["glassflows", "GLASSScheduler"]
GLASSScheduler.__module__ = GLASSFlowMatchScheduler.__module__ = "glassflows"

__all__ = [
    "BeamSearch",
    "BestOfN",
    "Calibration",
    "Comparison",
    "FeynmanKac",
    "FeynmanKacSteerer",
    "GLASSFlowMatchScheduler",
    "GLASSScheduler",
    "Halving",
    "Ledger",
    "MicroBatches",
    "RectifiedFlow",
    "Rollouts",
    "Samples",
    "SchedulerMixin",
    "Solver",
    "Steerer",
    "SteeringResult",
    "Trajectories",
    "Twist",
    "VarianceExploding",
    "VariancePreserving",
    "compare",
    "renewal",
    "rewards",
    "sample",
    "sample_posterior",
    "sample_transition",
    "value",
]

_LATER = {  # they import transformers
    "BeamSearch": "steering",
    "BestOfN": "steering",
    "Calibration": "steering",
    "Comparison": "steering",
    "FeynmanKac": "steering",
    "FeynmanKacSteerer": "steering",
    "Halving": "steering",
    "Ledger": "host.ledger",
    "MicroBatches": "host.microbatch",
    "Rollouts": "steering",
    "Samples": "steering",
    "Steerer": "steering",
    "SteeringResult": "steering",
    "Trajectories": "steering",
    "Twist": "steering",
    "compare": "steering",
}


def __getattr__(name: str) -> Any:
    if name == "rewards":
        return import_module(".rewards", __name__)
    if name in _LATER:
        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
