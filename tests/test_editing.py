"""Image-to-image, inpainting and callbacks: runs that start from an image, and latents that the host changes."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import tiny
from glassflows import GLASSScheduler, sample_posterior
from oracles import reference
from zoo.survey import cases

STEPS = 6


def run(pipe, seed=0, **kwargs):
    call = tiny.FLUX_CALL if "Flux" in type(pipe).__name__ else tiny.SD_CALL
    kwargs = {"num_inference_steps": STEPS, "generator": tiny.seeded(seed), "output_type": "np"} | call | kwargs
    return pipe("a cat", **kwargs).images


def picture():
    return torch.rand(1, 3, 16, 24, generator=tiny.seeded(3))


def left_half():
    mask = torch.zeros(1, 1, 16, 24)
    mask[..., :12] = 1
    return mask


# ---- image to image --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.flux_img2img, tiny.sd_img2img])
def test_images_from_one_noised_image_part_ways_at_the_first_boundary(make):
    """By the scheduler's own seed, with the same noised image; one transition knows no seed."""
    pipe, native = make(), make()
    call = {"image": picture(), "strength": 1.0, "num_inference_steps": 9}
    expected = run(native, **call)

    def drawn(seed, **options):
        pipe.scheduler = GLASSScheduler.from_scheduler(native.scheduler, **options)
        pipe.scheduler.set_generator(tiny.seeded(seed))
        seen = []

        def note(pipe, i, t, kwargs):
            seen.append(kwargs["latents"].clone())
            return {}

        if make is tiny.sd_img2img:  # these hand their own generator to `step`
            pipe.prepare_extra_step_kwargs = lambda generator, eta: {}
        return run(pipe, callback_on_step_end=note, **call), seen

    for seed in (1, 2):
        np.testing.assert_allclose(drawn(seed, num_transitions=1, solver_order=1)[0], expected, atol=5e-6)
    (image, seen), (other, others) = drawn(1, num_transitions=3), drawn(2, num_transitions=3)
    assert [torch.equal(*pair) for pair in zip(seen, others, strict=True)] == [True] * 3 + [False] * 6
    assert np.abs(image - other).max() > 1e-3


def test_rows_of_one_noised_image_part_ways():
    pipe = tiny.flux_img2img()
    pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler, num_transitions=3)
    generators = [tiny.seeded(0), tiny.seeded(0)]
    images = run(pipe, image=picture(), strength=0.9, num_images_per_prompt=2, generator=generators)
    assert np.abs(images[0] - images[1]).max() > 1e-3


@pytest.mark.parametrize("correlation", ["ddpm", 0.3])
@pytest.mark.parametrize("begin", [0, 3, 4])
def test_posterior_is_sample_posterior(begin, correlation):
    """One drawn transition from a noised sample is `sample_posterior`, with the same noise at the same calls."""
    law, _ = reference()
    scheduler = GLASSScheduler(num_transitions=1, first_transition="posterior", correlation=correlation)
    scheduler.set_timesteps(12, sigmas=np.linspace(0.9, 0.9 / 12, 12))
    scheduler.set_begin_index(begin)
    scheduler.set_generator(tiny.seeded(1))
    x = x_start = torch.randn(5, 3, generator=tiny.seeded())
    noise = torch.randn(5, 3, generator=tiny.seeded(1))
    for t in scheduler.timesteps[begin:]:
        level = 1 - float(t) / 1000
        x = scheduler.step(((x.double() - law(x.double(), level)) / (1 - level)).float(), t, x).prev_sample
    start = 1 - float(scheduler.timesteps[begin]) / 1000
    expected = sample_posterior(law, x_start.double(), start, num_steps=12 - begin, noise=noise.double())
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("rho", ["ddpm", 0.9, -0.5, -0.9])
@pytest.mark.parametrize("inner_grid", ["time", "condot"])
def test_posterior_runs_cut_anywhere_draw_the_models_law(rho, inner_grid):
    """z ~ N(0, 1): from x_t of its own law, at every call of 20, also where t* has passed the transition's end."""
    for begin in range(20):
        scheduler = GLASSScheduler(
            num_transitions=4, correlation=rho, inner_grid=inner_grid, first_transition="posterior"
        )
        scheduler.set_timesteps(20, sigmas=np.linspace(1, 1 / 20, 20))
        scheduler.set_begin_index(begin)
        scheduler.set_generator(tiny.seeded(1))
        s = float(scheduler.timesteps[begin]) / 1000
        x = math.sqrt((1 - s) ** 2 + s**2) * torch.randn(4000, 1, generator=tiny.seeded())
        for t in scheduler.timesteps[begin:]:
            s = float(t) / 1000
            x = scheduler.step((x - (1 - s) * x / ((1 - s) ** 2 + s**2)) / s, t, x).prev_sample
        assert abs(float(x.mean())) < 0.08, begin
        assert abs(float(x.std()) - 1) < 0.12, begin


def test_posterior_draws_have_the_posterior_law():
    """z ~ N(0, 1): given x_t, z has mean t x_t / (t² + (1 − t)²) and variance (1 − t)² / (t² + (1 − t)²)."""
    n, t = 20000, 0.4
    scheduler = GLASSScheduler(num_transitions=1, first_transition="posterior")
    scheduler.set_timesteps(60, sigmas=np.linspace(1 - t, (1 - t) / 60, 60))
    scheduler.set_generator(tiny.seeded(1))
    x = torch.full((n, 1), 0.8)
    for time in scheduler.timesteps:
        level = 1 - float(time) / 1000
        z = level * x / (level**2 + (1 - level) ** 2)
        x = scheduler.step((x - z) / (1 - level), time, x).prev_sample
    norm = t**2 + (1 - t) ** 2
    variance = (1 - t) ** 2 / norm
    assert abs(float(x.mean()) - t * 0.8 / norm) < 4 * math.sqrt(variance / n) + 2e-3
    assert abs(float(x.var()) - variance) < 4 * variance * math.sqrt(2 / n) + 2e-2 * variance


def test_posterior_in_a_pipeline():
    """One noised image, one transition, several images; the native scheduler draws one."""
    pipe = tiny.flux_img2img()
    pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler, num_transitions=1, first_transition="posterior")
    images = []
    for seed in (1, 2, 1):
        pipe.scheduler.set_generator(tiny.seeded(seed))
        images.append(run(pipe, image=picture(), strength=0.8))
    assert np.array_equal(images[0], images[2])
    assert np.abs(images[0] - images[1]).max() > 1e-3
    with pytest.raises(ValueError, match="first_transition: expected one of .*, got 'prior'"):
        GLASSScheduler(first_transition="prior")


def test_posterior_survives_saving(tmp_path):
    GLASSScheduler(first_transition="posterior").save_pretrained(tmp_path)
    assert GLASSScheduler.from_pretrained(tmp_path).config.first_transition == "posterior"


# ---- inpainting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.flux_inpaint, tiny.sd_inpaint])
@pytest.mark.parametrize("num_transitions", range(1, STEPS + 1))
def test_inpainting_keeps_what_the_native_scheduler_keeps(make, num_transitions):
    """One transition is the native sampler; with more the painted half differs and the kept one does not."""
    pipe = make()
    call = {"image": picture(), "mask_image": left_half(), "strength": 1.0, "output_type": "latent"}
    native = run(pipe, **call)
    pipe.scheduler = GLASSScheduler.from_config(pipe.scheduler.config, num_transitions=num_transitions, solver_order=1)
    ours = run(pipe, **call)
    if make is tiny.flux_inpaint:  # packed 2 × 2
        native, ours = (latents.view(1, 4, 6, 16).permute(0, 3, 1, 2) for latents in (native, ours))
    half = ours.shape[-1] // 2
    torch.testing.assert_close(ours[..., half:], native[..., half:], rtol=0, atol=1e-5)
    if num_transitions == 1:
        torch.testing.assert_close(ours, native, rtol=0, atol=1e-4)
    else:
        assert (ours - native)[..., :half].abs().max() > 0.1


BLENDING = ["ChromaInpaintPipeline", "FluxControlNetInpaintPipeline", "QwenImageInpaintPipeline",
            "StableDiffusion3InpaintPipeline", "StableDiffusionXLInpaintPipeline", "ZImageInpaintPipeline"]  # fmt: skip


@pytest.mark.parametrize("name", BLENDING)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_family_keeps_the_kept_half_of_its_latents(name):
    """Inside the loop, at every step: what the network is shown of the kept half is the native scheduler's."""
    pytest.importorskip("diffusers", minversion="0.42")
    case = cases()[name]
    pipe = case.build()
    native = pipe.scheduler
    if "Euler" in type(native).__name__ and "Flow" not in type(native).__name__:  # its latents are z + σ ε
        native = DDIMScheduler.from_config(native.config)
    seen = []
    for scheduler in (native, GLASSScheduler.from_scheduler(native, num_transitions=4)):
        latents = []

        def note(pipe, i, t, kwargs, latents=latents):
            latents.append(kwargs["latents"].clone())
            return {}

        pipe.scheduler = scheduler
        options = {"num_inference_steps": 8, "generator": tiny.seeded(), "output_type": "latent"}
        pipe(**(options | case.call() | {"callback_on_step_end": note}))
        seen.append(torch.stack(latents))
    same = (seen[0] - seen[1]).abs().amax(0) < 1e-5  # at every step
    assert 0.2 < same.float().mean() < 0.8


# ---- callbacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.flux, tiny.sd])
def test_callbacks_change_latents(make):
    """Set to zero after the last step they decode to what zero decodes to; changed on the way they change the image."""
    pipe = make()
    pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler, num_transitions=3)

    def zero(at):
        def callback(pipe, i, t, kwargs):
            return {"latents": torch.zeros_like(kwargs["latents"])} if i == at else {}

        return callback

    assert run(pipe, callback_on_step_end=zero(STEPS - 1), output_type="latent").abs().max() == 0
    plain, changed = run(pipe), run(pipe, callback_on_step_end=zero(2))
    assert np.abs(plain - changed).max() > 1e-3
    assert np.array_equal(plain, run(pipe))
