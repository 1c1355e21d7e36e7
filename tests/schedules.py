"""Every kind of noise schedule, and schedulers of diffusers that have them, as the tests use them."""

import numpy as np
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from glassflows import RectifiedFlow, VarianceExploding, VariancePreserving
from glassflows.flow.solver import Solver
from glassflows.flow.timetable import timetable

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
TABLES = {
    "linear": DDIMScheduler().alphas_cumprod,
    "scaled_linear": DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod,
    "cosine": DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod,
    "zero_terminal_snr": DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod,
}
SCHEDULES = {
    "flow": RectifiedFlow(),
    **{name: VariancePreserving(table.double().tolist()) for name, table in TABLES.items()},
    "exploding": VarianceExploding(),
}
NATIVES = {
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow_inverted": FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    "flow_karras": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
    "ddim": DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **SD),
    "ddim_zero_snr": DDIMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    ),
    "ddpm": DDPMScheduler(prediction_type="sample", clip_sample=False),
    "pndm": PNDMScheduler(skip_prk_steps=True, **SD),
    "euler": EulerDiscreteScheduler(**SD),
    "euler_karras": EulerDiscreteScheduler(use_karras_sigmas=True, prediction_type="v_prediction", **SD),
    "dpm": DPMSolverMultistepScheduler(**SD),
    "dpm_flow": DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
}
FLOW = RectifiedFlow()


def grid(num_steps):
    """Return the levels of equal steps of a flow."""
    return [FLOW.level(float(t)) for t in np.linspace(0, 1, num_steps + 1)]


def blocks(num_steps, num_transitions, correlation="ddpm", **options):
    """Return the transitions laid over them, of a solver with these options."""
    solver = Solver(**options)
    return timetable(grid(num_steps), num_transitions, schedule=FLOW, correlation=correlation, solver=solver)
