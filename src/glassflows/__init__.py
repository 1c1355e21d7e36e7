"""GLASS Flows for diffusers: stochastic transitions at ODE cost, and Feynman-Kac steering by any reward."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffusers import SchedulerMixin  # the pipeline loader looks for the base class here

from .flow.noise import RectifiedFlow, VarianceExploding, VariancePreserving
from .flow.sample import sample, sample_posterior, sample_transition, value
from .flow.transition import renewal
from .flow_match import GLASSFlowMatchScheduler
from .scheduler import GLASSScheduler

if TYPE_CHECKING:
    from . import rewards
    from .result import Ledger, SteeringResult
    from .steering import FeynmanKacSteerer

GLASSScheduler.__module__ = GLASSFlowMatchScheduler.__module__ = (
    "glassflows"  # so that model_index.json reads ["glassflows", "GLASSScheduler"]
)

__all__ = [
    "FeynmanKacSteerer",
    "GLASSFlowMatchScheduler",
    "GLASSScheduler",
    "Ledger",
    "RectifiedFlow",
    "SchedulerMixin",
    "SteeringResult",
    "VarianceExploding",
    "VariancePreserving",
    "renewal",
    "rewards",
    "sample",
    "sample_posterior",
    "sample_transition",
    "value",
]

_LATER = {"FeynmanKacSteerer": "steering", "Ledger": "result", "SteeringResult": "result"}  # they import transformers


def __getattr__(name: str) -> Any:
    if name == "rewards":
        return import_module(".rewards", __name__)
    if name in _LATER:
        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
