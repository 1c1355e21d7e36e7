"""Diffusers' sampler contract: a GLASS scheduler, the native one inside it, and its hooks."""

from .flow_match import GLASSFlowMatchScheduler
from .glass import GLASSScheduler, GLASSSchedulerOutput
from .hooks import Boundary, NetworkCall, TransitionHook

__all__ = [
    "Boundary",
    "GLASSFlowMatchScheduler",
    "GLASSScheduler",
    "GLASSSchedulerOutput",
    "NetworkCall",
    "TransitionHook",
]
