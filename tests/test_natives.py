import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from glassflows import natives
from glassflows.natives import Native


def test_class_is_told_by_the_keys_alone():
    for name in natives.SUPPORTED:
        config = getattr(diffusers, name)().config
        assert "_class_name" not in config
        assert natives.class_name(config) == name


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
        torch.testing.assert_close(native.labels(grid.levels[:-1], grid), grid.timesteps.float(), rtol=1e-5, atol=1e-3)


def test_clipping_is_the_natives():
    z = torch.linspace(-3, 3, 30).view(1, 3, 10)
    for options in ({"clip_sample": True, "clip_sample_range": 0.5}, {"thresholding": True, "clip_sample": False}):
        native = Native(DDIMScheduler(prediction_type="sample", **options))
        expected = z.clamp(-0.5, 0.5) if "clip_sample_range" in options else native.scheduler._threshold_sample(z)
        assert torch.equal(
            native.denoised(
                z,
                z,
                native.level_at(500),
            ),
            expected,
        )


def test_flow_sigmas_must_be_flow_times():
    with pytest.raises(ValueError, match=r"expected flow times in \[0, 1\], got 80"):
        Native(FlowMatchEulerDiscreteScheduler()).grid(None, None, sigmas=[80.0, 1.0])
