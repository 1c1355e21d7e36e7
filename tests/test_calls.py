"""The network calls of a run that does not begin at the first: image to image, and draws from a posterior."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import tiny
from chains import OPTIONS, chain, drive, glass
from glassflows import GLASSScheduler, sample_posterior
from oracles import gaussian, reference
from schedules import NATIVES

# ---- where a run begins ----------------------------------------------------------------------------------------------


def test_begin_index_is_found_from_the_first_timestep():
    x, v = torch.randn(2, 5, 3, generator=tiny.seeded())
    last = []
    for tell in (True, False):
        scheduler = GLASSScheduler(num_transitions=3)
        scheduler.set_timesteps(8, sigmas=np.linspace(1, 1 / 8, 8))
        if tell:
            scheduler.set_begin_index(3)
        latents = x
        for t in scheduler.timesteps[3:]:
            latents = scheduler.step(v, t, latents).prev_sample
        last.append(latents)
        with pytest.raises(ValueError, match="^step: the run has ended: call set_timesteps to begin another$"):
            scheduler.step(v, t, latents)
    assert torch.equal(*last)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(7)
    with pytest.raises(ValueError, match="^set_begin_index: expected 0 to 3, got 7$"):
        scheduler.step(v, scheduler.timesteps[0], x)
    scheduler.set_timesteps(4)
    with pytest.raises(
        ValueError, match=r"^step: timestep 123\.4\d* is not in scheduler\.timesteps: set_timesteps was"
    ):
        scheduler.step(v, torch.tensor(123.4), x)


@pytest.mark.parametrize("rho", [1.0, -1.0, 0.9, -0.3, [0.5, "ddpm", "ddpm"]], ids=str)
@pytest.mark.parametrize("begin", range(12))
def test_runs_cut_anywhere_are_finite(rho, begin):
    """The rest of a cut transition may make its last call at its end or beyond."""
    start = torch.randn(5, 3, generator=tiny.seeded(7))
    cut_off = chain(begin=begin, x=start, num_transitions=3, correlation=rho)[-1]
    assert cut_off.isfinite().all()
    assert cut_off.abs().max() < 10


@pytest.mark.parametrize("options", OPTIONS[3:5], ids=str)
def test_a_cut_transition_is_the_ode_through_its_listed_times(options):
    """Begun inside a transition: Euler through the rest of its t* to its own end, written independently."""
    law, _ = reference()
    size = 12 // options["num_transitions"]
    begin = size + 1  # the second call of the second transition
    scheduler = glass(12, begin, solver_order=1, **options)
    times = [1 - float(t) / 1000 for t in scheduler.timesteps[begin : 2 * size]] + [2 * size / 12]
    x = torch.randn(5, 3, generator=tiny.seeded())
    expected = x.double()
    for now, then in pairwise(times):
        expected = expected + (then - now) * (law(expected, now) - expected) / (1 - now)
    ours = drive(scheduler, law, x, begin=begin)[2 * size - begin]
    torch.testing.assert_close(ours, expected.float(), rtol=0, atol=2e-5)


# ---- image to image --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.4, 0.9])
def test_one_transition_is_the_native_ode(img2img, strength):
    call = {"num_inference_steps": 8, "strength": strength}
    native = img2img.run(**call)
    np.testing.assert_allclose(img2img.glass(1, solver_order=1).run(**call), native, atol=5e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_remaining_call_is_made(options):
    toy = tiny.Toy(tiny.flux_img2img).glass(**options)
    images = [toy.run(num_inference_steps=8, strength=0.6) for _ in range(2)]
    assert np.array_equal(*images)
    assert toy.pipe.scheduler.step_index == 8


def test_images_from_one_noised_image_part_ways_at_the_first_boundary(img2img):
    """By the scheduler's own seed, with the same noised image; one transition knows no seed."""
    call = {"strength": 1.0, "num_inference_steps": 9}
    native, expected = img2img.pipe.scheduler, img2img.run(**call)
    if img2img.make is tiny.sd_img2img:  # these hand their own generator to `step`
        img2img.pipe.prepare_extra_step_kwargs = lambda generator, eta: {}

    def drawn(seed, **options):
        img2img.pipe.scheduler = native
        img2img.glass(**options).pipe.scheduler.set_generator(tiny.seeded(seed))
        seen = []

        def note(pipe, i, t, kwargs):
            seen.append(kwargs["latents"].clone())
            return {}

        return img2img.run(callback_on_step_end=note, **call), seen

    for seed in (1, 2):
        np.testing.assert_allclose(drawn(seed, num_transitions=1, solver_order=1)[0], expected, atol=5e-6)
    (image, seen), (other, others) = drawn(1), drawn(2)
    assert [torch.equal(*pair) for pair in zip(seen, others, strict=True)] == [True] * 3 + [False] * 6
    assert np.abs(image - other).max() > 1e-3


def test_rows_of_one_noised_image_part_ways():
    toy = tiny.Toy(tiny.flux_img2img).glass()
    images = toy.run(strength=0.9, num_images_per_prompt=2, generator=[tiny.seeded(0), tiny.seeded(0)])
    assert np.abs(images[0] - images[1]).max() > 1e-3


@pytest.mark.parametrize("name", ["flow", "ddim"])
def test_noising_is_the_natives_own(name):
    native = type(NATIVES[name]).from_config(NATIVES[name].config)
    native.set_timesteps(6)
    glass = GLASSScheduler.from_scheduler(native)
    glass.set_timesteps(6)
    z, noise = torch.randn(2, 3, 4, 6, 10, generator=tiny.seeded())
    t = glass.timesteps[torch.tensor([2, 2, 4])]
    expected = native.scale_noise(z, t, noise) if name == "flow" else native.add_noise(z, noise, t)
    torch.testing.assert_close(glass.scale_noise(z, t, noise), expected)
    torch.testing.assert_close(glass.add_noise(z, noise, t), expected)


def test_noising_off_the_grid():
    glass = GLASSScheduler.from_scheduler(NATIVES["ddim"])
    z, noise = torch.randn(2, 3, 4, generator=tiny.seeded())
    t = torch.tensor([999, 10, 0])
    torch.testing.assert_close(glass.add_noise(z, noise, t), NATIVES["ddim"].add_noise(z, noise, t))


# ---- a first transition that draws -----------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", ["ddpm", 0.3])
@pytest.mark.parametrize("begin", [0, 3, 4])
def test_posterior_is_sample_posterior(begin, correlation):
    """One drawn transition from a noised sample is `sample_posterior`, with the same noise at the same calls."""
    law, _ = reference()
    posterior = {"num_transitions": 1, "first_transition": "posterior", "correlation": correlation}
    scheduler = glass(12, begin, first=0.9, **posterior)
    x = torch.randn(5, 3, generator=tiny.seeded())
    noise = torch.randn(5, 3, generator=tiny.seeded(1))
    drawn = drive(scheduler, law, x, begin=begin)[-1]
    start = 1 - float(scheduler.timesteps[begin]) / 1000
    expected = sample_posterior(law, x.double(), start, num_steps=12 - begin, noise=noise.double())
    torch.testing.assert_close(drawn.double(), expected, rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rho", ["ddpm", 0.9, -0.5, -0.9])
@pytest.mark.parametrize("inner_grid", ["time", "condot"])
def test_posterior_runs_cut_anywhere_draw_the_models_law(rho, inner_grid):
    """z ~ N(0, 1): from x_t of its own law, at every call of 20, also where t* has passed the transition's end."""
    posterior = {"correlation": rho, "inner_grid": inner_grid, "first_transition": "posterior"}
    for begin in range(20):
        scheduler = glass(20, begin, num_transitions=4, **posterior)
        s = float(scheduler.timesteps[begin]) / 1000
        x = math.sqrt((1 - s) ** 2 + s**2) * torch.randn(4000, 1, generator=tiny.seeded())
        drawn = drive(scheduler, gaussian, x, begin=begin)[-1]
        assert abs(float(drawn.mean())) < 0.08, begin
        assert abs(float(drawn.std()) - 1) < 0.12, begin


def test_posterior_draws_have_the_posterior_law():
    """z ~ N(0, 1): given x_t, z has mean t x_t / (t² + (1 − t)²) and variance (1 − t)² / (t² + (1 − t)²)."""
    n, t = 20000, 0.4
    scheduler = glass(60, first=1 - t, num_transitions=1, first_transition="posterior")
    drawn = drive(scheduler, gaussian, torch.full((n, 1), 0.8))[-1]
    norm = t**2 + (1 - t) ** 2
    variance = (1 - t) ** 2 / norm
    assert abs(float(drawn.mean()) - t * 0.8 / norm) < 4 * math.sqrt(variance / n) + 2e-3
    assert abs(float(drawn.var()) - variance) < 4 * variance * math.sqrt(2 / n) + 2e-2 * variance


def test_posterior_in_a_pipeline():
    """One noised image, one transition, several images; the native scheduler draws one."""
    toy = tiny.Toy(tiny.flux_img2img).glass(1, first_transition="posterior")
    images = []
    for seed in (1, 2, 1):
        toy.pipe.scheduler.set_generator(tiny.seeded(seed))
        images.append(toy.run(strength=0.8))
    assert np.array_equal(images[0], images[2])
    assert np.abs(images[0] - images[1]).max() > 1e-3
