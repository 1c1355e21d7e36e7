"""GLASS Flows: stochastic transitions of a pre-trained model, sampled by an ODE."""

from .flow.noise import RectifiedFlow, VariancePreserving
from .flow.sample import sample, sample_posterior, sample_transition

__all__ = ["RectifiedFlow", "VariancePreserving", "sample", "sample_posterior", "sample_transition"]
