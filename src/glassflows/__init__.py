"""GLASS Flows for diffusers: stochastic transitions at ODE cost, and Feynman-Kac steering by any reward."""

from diffusers import SchedulerMixin  # the pipeline loader looks for the base class here

from .flow.noise import RectifiedFlow, VarianceExploding, VariancePreserving
from .flow.sample import sample, sample_posterior, sample_transition, value
from .flow.transition import renewal
from .flow_match import GLASSFlowMatchScheduler
from .result import Ledger, SteeringResult
from .scheduler import GLASSScheduler
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
    "sample",
    "sample_posterior",
    "sample_transition",
    "value",
]
