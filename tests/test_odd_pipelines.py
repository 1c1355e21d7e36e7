"""Two stages of one run, two experts of one loop: pipelines that do more than one network over one schedule."""

import numpy as np
import pytest

pytest.importorskip("diffusers", minversion="0.42")  # older ones build other pipelines

from diffusers import DDIMScheduler

import tiny
from glassflows import GLASSScheduler
from zoo import stable_diffusion_xl, wan

DDIM = {"beta_schedule": "scaled_linear", "clip_sample": False, "timestep_spacing": "trailing"}


@pytest.mark.slow
@pytest.mark.parametrize("cutoff", [0.3, 0.6])
def test_sdxl_base_and_refiner(cutoff):
    """One run over two pipelines: natively, by one transition of order 1, and by several."""
    base = stable_diffusion_xl.build("StableDiffusionXLPipeline")
    refiner = stable_diffusion_xl.build("StableDiffusionXLImg2ImgPipeline", **stable_diffusion_xl.REFINER)

    def run(make):
        base.scheduler, refiner.scheduler = make(), make()
        options = {"num_inference_steps": 10, "generator": tiny.seeded()}
        call = stable_diffusion_xl.text_to_image()
        latents = base(**options, **call, denoising_end=cutoff, output_type="latent").images
        calls = []
        hook = refiner.unet.register_forward_pre_hook(lambda *_: calls.append(1))
        call = stable_diffusion_xl.refiner() | {"image": latents, "denoising_start": cutoff}
        images = refiner(**options, **call, output_type="np").images
        hook.remove()
        return images, len(calls)

    def glass(**options):
        return run(lambda: GLASSScheduler.from_scheduler(DDIMScheduler(**DDIM), **options))

    (native, calls), (ode, ode_calls) = run(lambda: DDIMScheduler(**DDIM)), glass(num_transitions=1, solver_order=1)
    np.testing.assert_allclose(ode, native, atol=2e-5)
    ours, our_calls = glass(num_transitions=4)
    assert np.isfinite(ours).all()
    assert calls == ode_calls == our_calls == round(10 * (1 - cutoff))
    assert np.array_equal(ours, glass(num_transitions=4)[0])


@pytest.mark.parametrize("correlation", ["ddpm", -0.9])
def test_each_call_goes_to_the_expert_of_its_noise_level(correlation):
    """Also where t* comes back above the boundary after a transition that overshot it."""
    pipe = wan.two_experts()
    pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler, num_transitions=4, correlation=correlation)
    told = {"transformer": [], "transformer_2": []}
    for name, times in told.items():
        getattr(pipe, name).register_forward_pre_hook(
            lambda module, args, kwargs, times=times: times.append(float(kwargs["timestep"][0])), with_kwargs=True
        )
    pipe(num_inference_steps=12, generator=tiny.seeded(), output_type="np", **wan.two_experts_call())
    boundary = 1000 * pipe.config.boundary_ratio
    times = [float(t) for t in pipe.scheduler.timesteps]
    assert (times == sorted(times, reverse=True)) == (correlation == "ddpm")
    assert sorted(set(told["transformer"])) == sorted({t for t in times if t >= boundary})
    assert sorted(set(told["transformer_2"])) == sorted({t for t in times if t < boundary})
