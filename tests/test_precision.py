"""Half precision: the scheduler adds no error of its own to that of a half-precision network."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import tiny
from glassflows import GLASSScheduler

NATIVES = {
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "ddim": DDIMScheduler(**tiny.SD_SCHEDULER, prediction_type="v_prediction"),
}


def network(x, t):
    """A smooth network that computes in the precision of its input."""
    return torch.tanh(0.8 * x.roll(1, -1) + 0.3 * math.sin(float(t) / 300)) - 0.4 * x


def run(scheduler, dtype, steps=40):
    """Return the last latents, kept in `dtype` from step to step, of noise that the same dtype can hold."""
    scheduler.set_timesteps(steps)
    if isinstance(scheduler, GLASSScheduler):
        scheduler.set_generator(tiny.seeded(1))  # the same injected noise in every precision
    x = torch.randn(8, 3, 16, 16, generator=tiny.seeded()).bfloat16().to(dtype)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
        assert x.dtype == dtype
    return x.double()


def error(scheduler, dtype):
    return float((run(scheduler, dtype) - run(scheduler, torch.float32)).square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NATIVES)
def test_no_drift(name, dtype):
    """Against its own run in float32, on the same noise: no further off than the native scheduler from its own."""
    native = error(NATIVES[name], dtype)
    for num_transitions in (1, 5, 40):
        ours = GLASSScheduler.from_scheduler(NATIVES[name], num_transitions=num_transitions, solver_order=1)
        assert error(ours, dtype) <= native, num_transitions


def test_a_host_that_rounds_edits_nothing():
    """Mochi hands float32 latents to `step` and keeps bfloat16: the second order survives."""
    last = {}
    for rounded, order in ((False, 1), (False, 2), (True, 2)):
        scheduler = GLASSScheduler.from_scheduler(NATIVES["flow"], num_transitions=1, solver_order=order)
        scheduler.set_timesteps(12)
        x = torch.randn(8, 3, 16, 16, generator=tiny.seeded())
        for t in scheduler.timesteps:
            x = x.bfloat16().float() if rounded else x
            x = scheduler.step(network(x, t), t, x).prev_sample
        last[rounded, order] = x
    order, rounding = ((last[False, 2] - other).square().mean().sqrt() for other in (last[False, 1], last[True, 2]))
    assert rounding < order / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pipelines_in_half_precision(toy, dtype):
    """Close to the float32 run of the same pipeline, and the same again."""
    images = {}
    if toy.make is tiny.sd:  # it hands its generator to `step`
        toy.pipe.prepare_extra_step_kwargs = lambda generator, eta: {}
    for again, kind in enumerate((torch.float32, dtype, dtype)):
        toy.pipe.to(kind)
        toy.glass().pipe.scheduler.set_generator(tiny.seeded(1))
        images[again] = toy.run(latents=toy.latents(1).to(kind), generator=None)
    assert np.isfinite(images[1]).all()
    assert np.abs(images[1] - images[0]).max() < 0.1
    assert np.array_equal(images[1], images[2])
