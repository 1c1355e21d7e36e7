"""Which native scheduler classes have a GLASS counterpart, and why others have none.

A class is named, not imported: an older diffusers may lack it.
"""

from __future__ import annotations

from enum import Enum

FLOW_MATCH_EULER = "FlowMatchEulerDiscreteScheduler"
FLOW_MATCH_HEUN = "FlowMatchHeunDiscreteScheduler"
HEUN = "HeunDiscreteScheduler"
PNDM = "PNDMScheduler"
COSINE_DPM = "CosineDPMSolverMultistepScheduler"
EDM_DPM = "EDMDPMSolverMultistepScheduler"

FLOW = (FLOW_MATCH_EULER, "HeliosScheduler", FLOW_MATCH_HEUN)
"""They step over σ of the straight path."""

_DDIM_LIKE = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "UnCLIPScheduler",
)
TABLE = (*_DDIM_LIKE, PNDM, "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
"""They step over the entries of `alphas_cumprod`."""

EDM = (EDM_DPM, COSINE_DPM)
"""They step over σ, with data of a given standard deviation."""

EXPLODING = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    HEUN,
    *EDM,
)
"""They step over x = z + σ ε."""

SIGMAS = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
)
"""They step over σ/α of a table, or over flow times where `use_flow_sigmas`."""

SUPPORTED = (*FLOW, *TABLE, *EXPLODING, *SIGMAS)

CLIPPED = (*_DDIM_LIKE, HEUN)
"""They honour `clip_sample`."""

CALLED_TWICE = (FLOW_MATCH_HEUN, HEUN)
"""Their lists name each network call but the first twice."""

NATIVE_READS = (
    "alphas",
    "alphas_cumprod",
    "betas",
    "final_alpha_cumprod",
    "one",
    "alpha_t",
    "sigma_t",
    "lambda_t",
    "sigmas",
    "sigma_min",
    "sigma_max",
    "shift",
    "set_shift",
    "get_velocity",
    "precondition_inputs",
    "precondition_noise",
    "precondition_outputs",
)
"""What pipelines and training scripts read of a native scheduler beside its run.

What steps a native scheduler, or tells where it is, is not among them."""

NEARLY_ZERO = 2**-24
"""What Euler, DPM-Solver and UniPC raise the last ᾱ to that `rescale_betas_zero_snr` makes 0."""

COSMOS2_KEYS = ("sigma_data", "sigma_max", "sigma_min", "final_sigmas_type")
"""What the pipelines of Cosmos 2 add to the config of a flow scheduler, which then runs on
x = z + σ ε."""

_INSTEAD = "give the pipeline {0}.from_config(pipe.scheduler.config) first"


class Refusal(Enum):
    """Why a class has no GLASS counterpart."""

    DISTILLED = (
        "its network was distilled to jump to data, so it gives no denoised mean to sample from"
    )
    TWO_CALLS = "it makes two network calls per step; " + _INSTEAD.format("EulerDiscreteScheduler")
    ANOTHER_SAMPLER = "it is another sampler of the same models; " + _INSTEAD.format(
        FLOW_MATCH_EULER
    )
    STEPPED_TWICE = (
        "its pipelines step it twice per timestep (Cosmos 1); with a model of the SDXL kind, "
        + _INSTEAD.format(EDM_DPM)
    )
    OWN_PATH = "its times are ratios on a path of their own (Würstchen, Stable Cascade)"
    INVERSE = "it runs from data to noise"
    DISCRETE = "it samples discrete tokens"


_REFUSED_CLASSES = {
    Refusal.DISTILLED: "CMStochasticIterative ConsistencyDecoder FlowMapEulerDiscrete FlowMatchLCM "
    "HeliosDMD LCM Piflow SCM TCD",
    Refusal.TWO_CALLS: "DPMSolverSDE KDPM2AncestralDiscrete KDPM2Discrete",
    Refusal.ANOTHER_SAMPLER: "LTXEulerAncestralRF",
    Refusal.STEPPED_TWICE: "EDMEuler",
    Refusal.OWN_PATH: "DDPMWuerstchen",
    Refusal.INVERSE: "DDIMInverse DPMSolverMultistepInverse",
    Refusal.DISCRETE: "Amused BlockRefinement DiscreteDDIM EntropyBound VQDiffusion",
}
REFUSED = {
    f"{name}Scheduler": refusal
    for refusal, names in _REFUSED_CLASSES.items()
    for name in names.split()
}


class UnsupportedScheduler(ValueError):
    """A native scheduler, or what it is asked for, has no GLASS counterpart."""


class NeedsFlowMatchScheduler(UnsupportedScheduler):
    """A pipeline asks for the native class by isinstance: give it a `GLASSFlowMatchScheduler`."""


class NeedsNoiseScale(UnsupportedScheduler):
    """A pipeline begins with other noise than its scheduler says: pass `noise_scale`."""


def check_class(name: str) -> str:
    """Return the name of a supported native class.

    Raises:
        UnsupportedScheduler: for any other, with the reason.
    """
    if name in SUPPORTED:
        return name
    refusal = REFUSED.get(name)
    reason = refusal.value if refusal else f"expected one of {', '.join(SUPPORTED)}"
    raise UnsupportedScheduler(f"scheduler: got {name}, which has no GLASS counterpart: {reason}")
