"""Every native scheduler in every setting that moves its grid: the same calls, the same noise levels, the same ODE."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from glassflows import GLASSScheduler
from glassflows.scheduler import config as configs
from glassflows.scheduler import supported
from glassflows.scheduler.native import Native

LINEAR = np.linspace(1, 1 / 7, 7)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
SPACINGS = [{"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"},
            {"timestep_spacing": "linspace"}]  # fmt: skip
BENDS = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
DYNAMIC = {"use_dynamic_shifting": True}

FLOW_MATCH = [
    ({"shift": 3.0}, {}),
    ({"shift": 3.0, "shift_terminal": 0.1}, {}),
    ({"shift": 3.0, "invert_sigmas": True}, {"sigmas": LINEAR}),
    ({"shift": 3.0, "invert_sigmas": True}, {}),
    ({"shift": 3.0}, {"sigmas": LINEAR}),
    ({"shift": 3.0}, {"sigmas": LINEAR, "timesteps": [1000 * s for s in LINEAR]}),  # CogView 4: t is not 1000 σ
    (DYNAMIC, {"sigmas": LINEAR, "mu": 0.8}),
    ({**DYNAMIC, "time_shift_type": "linear", "shift_terminal": 0.02}, {"sigmas": LINEAR, "mu": 0.8}),
    *(({"shift": 3.0, **bend}, {}) for bend in BENDS),
]
HEUN = ["HeunDiscrete", "FlowMatchHeunDiscrete"]
SIGMA_STEPPERS = ["DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "SASolver"]
TABLES = ["DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "PNDM"]
COGVIDEOX = ["CogVideoXDDIM", "CogVideoXDPM"]
COGVIDEOX_CONFIG = {**SD, **ZERO_SNR, "snr_shift_scale": 3.0, "clip_sample": False}
EDM = ["EDMDPMSolverMultistep", "CosineDPMSolverMultistep"]

# fmt: off
MATRIX = [
    *(("FlowMatchEulerDiscrete", *settings) for settings in FLOW_MATCH),
    *((name, {**SD, **spacing}, {}) for name in TABLES for spacing in SPACINGS),
    *((name, {**SD, **ZERO_SNR, "clip_sample": False}, {}) for name in ("DDIM", "DDPM")),
    *((name, {**SD, "prediction_type": "sample"}, {}) for name in ("DDIM", "DDPM", "EulerDiscrete")),
    ("DDIM", {**SD, "set_alpha_to_one": False}, {}),
    *((name, {}, {}) for name in ("HeunDiscrete", "FlowMatchHeunDiscrete", "UnCLIP")),
    ("DDPM", SD, {"timesteps": [900, 700, 400, 100, 20, 3]}),
    *((name, {**SD, **spacing}, {}) for name in ("EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete")
      for spacing in SPACINGS),
    ("EulerAncestralDiscrete", {**SD, **ZERO_SNR}, {}),
    *((name, {**SD, **bend}, {}) for name in ("EulerDiscrete", "LMSDiscrete") for bend in BENDS),
    ("EulerDiscrete", {**SD, "final_sigmas_type": "sigma_min", "prediction_type": "v_prediction"}, {}),
    ("EulerDiscrete", {**SD, "timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_min": 0.002,
                       "sigma_max": 700.0, "use_karras_sigmas": True}, {}),
    *((name, FLOW, {}) for name in SIGMA_STEPPERS),
    *((name, {**SD, **settings}, {}) for name in SIGMA_STEPPERS
      for settings in (*SPACINGS, *BENDS, {"prediction_type": "v_prediction"})
      if not (name.endswith("Singlestep") and "timestep_spacing" in settings)),
    ("DPMSolverMultistep", {**SD, "final_sigmas_type": "sigma_min"}, {}),
    ("DPMSolverMultistep", {**SD, "use_lu_lambdas": True}, {}),
    ("UniPCMultistep", {**FLOW, "use_dynamic_shifting": True, "flow_shift": 1.0}, {"sigmas": LINEAR, "mu": 0.8}),
    *((name, {**COGVIDEOX_CONFIG, **more}, {}) for name in COGVIDEOX
      for more in ({}, {"set_alpha_to_one": False, "timestep_spacing": "linspace"})),
    *((name, {"sigma_schedule": bend, "final_sigmas_type": end, "prediction_type": kind}, {}) for name in EDM
      for bend, end, kind in (("karras", "zero", "epsilon"), ("exponential", "sigma_min", "v_prediction"))),
]
# fmt: on


def scheduler_of(name, config):
    return getattr(diffusers, f"{name}Scheduler")(**config)


def shown(value):
    return value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items() if k not in SD)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config", "given"), MATRIX, ids=shown)
def test_grid_is_the_native_one(name, config, given):
    native = scheduler_of(name, config | {"skip_prk_steps": True} if name == "PNDM" else config)
    glass = GLASSScheduler.from_scheduler(native) if name == HEUN[1] else GLASSScheduler.from_config(native.config)
    own = {key: value for key, value in native.config.items() if not key.startswith("_")}
    steps = given or {"num_inference_steps": 7}
    native.set_timesteps(**steps)
    glass.set_timesteps(**steps)
    repeats = name in ("PNDM", *HEUN)
    expected = list(dict.fromkeys(native.timesteps.tolist())) if repeats else native.timesteps.tolist()
    assert glass.timesteps.tolist() == expected
    assert glass.num_inference_steps == len(expected) == len(glass.sigmas) - 1
    if name in HEUN:
        native.sigmas = native.sigmas.unique().flip(0)
    ratios = native.sigmas.double() if hasattr(native, "sigmas") else [
        ((1 - a) / a).sqrt() if (a := native.alphas_cumprod[t].double()) else torch.tensor(math.inf) for t in expected
    ]  # fmt: skip
    for ours, theirs in zip(glass.sigmas, ratios, strict=hasattr(native, "sigmas")):
        torch.testing.assert_close(ours.double(), torch.as_tensor(theirs).double(), rtol=1e-5, atol=1e-6)
    assert {key: type(native).from_config(glass.config).config[key] for key in own} == own


NO_FIRST_ORDER_ODE = (
    *HEUN, "UnCLIP",
    "DDPM", "DDPMParallel", "PNDM", "SASolver", "EulerAncestralDiscrete", "LMSDiscrete", "CogVideoXDPM",
    "CosineDPMSolverMultistep", "DPMSolverSinglestep",
)  # fmt: skip
ODES = [  # DDIM's own previous timestep is its next one only where N divides 1000
    case for case in MATRIX
    if case[0] not in NO_FIRST_ORDER_ODE and not ("DDIM" in case[0] and case[1].get("timestep_spacing") == "linspace")
]  # fmt: skip


def network(x, t):
    """A smooth function of the network's input and of what it is told."""
    return torch.tanh(1.3 * x.roll(1, -1) + 0.4 * math.sin(float(t) / 300)) - 0.5 * x


@pytest.mark.parametrize(("name", "config", "given"), ODES, ids=shown)
def test_one_transition_is_the_native_ode(name, config, given):
    """With any network: the coordinates, the conversion to ẑ and both ends of the grid are the native ones."""
    known = configs.parameters(f"{name}Scheduler")
    euler = {
        key: value
        for key, value in {"solver_order": 1, "clip_sample": False, "disable_corrector": list(range(9))}.items()
        if key in known
    }
    native = scheduler_of(name, config | euler)
    glass = GLASSScheduler.from_scheduler(native, num_transitions=1, solver_order=1)
    steps = given or {"num_inference_steps": 8}
    noise = torch.randn(2, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    last = []
    for scheduler in (native, glass):
        scheduler.set_timesteps(**steps)
        x = noise
        if scheduler is native and f"{name}Scheduler" in supported.EXPLODING:  # its own start is near this, or this
            x = noise * math.hypot(native.sigmas[0], native.config.get("sigma_data", 1.0))
        for t in scheduler.timesteps:
            x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(network(x_in, t), t, x, return_dict=False)[0]
        last.append(x)
    torch.testing.assert_close(*last, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["DDIM", "CogVideoXDDIM"])
def test_where_ddim_steps_elsewhere_the_ode_is_its_formula_on_our_grid(name):
    """Its "previous timestep" is t − T/N, not the next one of a grid laid otherwise."""
    native = scheduler_of(name, SD | {"timestep_spacing": "linspace", "clip_sample": False})
    glass = GLASSScheduler.from_scheduler(native, num_transitions=1, solver_order=1)
    glass.set_timesteps(7)
    ours = expected = torch.randn(2, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    table = [*native.alphas_cumprod[glass.timesteps].tolist(), float(native.final_alpha_cumprod)]
    for t, now, then in zip(glass.timesteps, table[:-1], table[1:], strict=True):
        epsilon = network(expected, t)
        z = (expected - math.sqrt(1 - now) * epsilon) / math.sqrt(now)
        expected = math.sqrt(then) * z + math.sqrt(1 - then) * epsilon
        ours = glass.step(network(ours, t), t, ours).prev_sample
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "DDIM", "UniPCMultistep"])
def test_order_two_converges_to_the_same_limit_faster(name):
    """One transition through a smooth network: the error at 20 calls, and that order 1 nears the same limit."""
    config = {"FlowMatchEulerDiscrete": {}, "UniPCMultistep": FLOW}.get(name, SD | {"prediction_type": "v_prediction"})
    config = config | {"clip_sample": False, "timestep_spacing": "trailing"} if name == "DDIM" else config
    noise = torch.randn(2, 3, 6, 10, generator=torch.Generator().manual_seed(0))

    def last(steps, order):
        glass = GLASSScheduler.from_scheduler(scheduler_of(name, config), num_transitions=1, solver_order=order)
        glass.set_timesteps(steps)
        x = noise.double()
        for t in glass.timesteps:
            x = glass.step(network(x, t), t, x).prev_sample
        return x

    first, second = (float((last(20, order) - last(500, 2)).square().mean().sqrt()) for order in (1, 2))
    assert float((last(500, 1) - last(500, 2)).square().mean().sqrt()) < first / 10  # the same limit
    assert second < first / 4, (first, second)


def test_where_the_native_samplers_end():
    """DDIM and PNDM end at the first entry of the table unless `set_alpha_to_one`; DDPM and flows end at clean data."""
    ends = {
        DDIMScheduler(set_alpha_to_one=True): 0.0,
        DDIMScheduler(set_alpha_to_one=False): math.sqrt(1e-4),
        PNDMScheduler(skip_prk_steps=True): math.sqrt(1e-4),
        DDPMScheduler(): 0.0,
        FlowMatchEulerDiscreteScheduler(): 0.0,
    }
    for scheduler, sigma in ends.items():
        grid = Native(scheduler).grid(5, None)
        assert grid.levels[-1].sigma == pytest.approx(sigma, rel=1e-4)


def test_labels_lie_on_the_grid():
    for scheduler in (
        DDIMScheduler(),
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    ):
        native = Native(scheduler)
        grid = native.grid(7, None)
        torch.testing.assert_close(
            native.timesteps(grid.levels[:-1], grid), grid.timesteps.float(), rtol=1e-5, atol=1e-3
        )


def test_clipping_is_the_natives():
    z = torch.linspace(-3, 3, 30).view(1, 3, 10)
    heun = Native(HeunDiscreteScheduler(prediction_type="sample", clip_sample=True, clip_sample_range=0.5))
    assert heun.denoised(z, z, heun.level_at(500)).abs().max() == 0.5
    for predict_x0 in (True, False):  # UniPC thresholds in one of its forms only
        unipc = Native(UniPCMultistepScheduler(prediction_type="sample", thresholding=True, predict_x0=predict_x0))
        assert torch.equal(unipc.denoised(z, z, unipc.level_at(500)), z) != predict_x0
    for options in ({"clip_sample": True, "clip_sample_range": 0.5}, {"thresholding": True, "clip_sample": False}):
        native = Native(DDIMScheduler(prediction_type="sample", **options))
        expected = z.clamp(-0.5, 0.5) if "clip_sample_range" in options else native.scheduler._threshold_sample(z)
        assert torch.equal(native.denoised(z, z, native.level_at(500)), expected)


def test_flow_sigmas_must_be_flow_times():
    with pytest.raises(ValueError, match=r"^sigmas: expected flow times in \[0, 1\], got 80: .* GLASSFlowMatchSch"):
        Native(FlowMatchEulerDiscreteScheduler()).grid(None, None, sigmas=[80.0, 1.0])
