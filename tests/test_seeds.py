"""Noise follows what the caller drew, not what was computed from it: rounding and torch's defaults change nothing."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", minversion="0.42")  # older ones build other pipelines

import tiny
from glassflows import FeynmanKacSteerer, GLASSScheduler
from glassflows.scheduler.noise_source import NoiseSource
from zoo.survey import arguments, cases

pytestmark = pytest.mark.filterwarnings("ignore:You have passed .* text prompts:FutureWarning")  # of diffusers

IMAGE = torch.rand(1, 3, 16, 24, generator=tiny.seeded(3))
CALLS = {
    "flux_img2img": (tiny.flux_img2img, tiny.FLUX_CALL | {"image": IMAGE, "strength": 0.7}),
    "sd_img2img": (tiny.sd_img2img, tiny.SD_CALL | {"image": IMAGE, "strength": 0.7}),
    "flux_inpaint": (
        tiny.flux_inpaint,
        tiny.FLUX_CALL | {"image": IMAGE, "mask_image": torch.ones(1, 1, 16, 24), "strength": 0.8},
    ),
}


def rounded_encodings(pipe, size):
    """Let the autoencoder's encodings differ as they would on another machine."""
    encode, generator = pipe.vae.encode, tiny.seeded(99)

    def encoding(*args, **kwargs):
        out = encode(*args, **kwargs)
        distribution = out.latent_dist
        distribution.mean = distribution.mean + size * torch.randn(distribution.mean.shape, generator=generator)
        return out

    pipe.vae.encode = encoding


def row_seeds(x, stream=()):
    return NoiseSource().seeds(x, stream)


def run(pipe, call, number=2):
    pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler, num_transitions=3)
    return pipe(
        "a cat", num_images_per_prompt=number, num_inference_steps=9, generator=tiny.seeded(), output_type="np", **call
    ).images


@pytest.mark.parametrize("name", CALLS)
def test_rounding_of_an_image_does_not_change_the_noise(name):
    make, call = CALLS[name]
    expected = run(make(), call)
    for size in (1e-7, 1e-6, 1e-5):
        pipe = make()
        rounded_encodings(pipe, size)
        np.testing.assert_allclose(run(pipe, call), expected, atol=100 * size + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_rounding_of_an_image_does_not_change_who_goes_on(name):
    make, call = CALLS[name]
    results = []
    for size in (0.0, 1e-6):
        pipe = make()
        rounded_encodings(pipe, size)
        steerer = FeynmanKacSteerer(
            pipe, lambda images, prompts: 1000 * images.mean((1, 2, 3)), 4, num_transitions=3, ess_threshold=1.0
        )
        results.append(steerer("a cat", num_inference_steps=9, generator=tiny.seeded(), output_type="np", **call))
    assert torch.equal(results[0].ancestors, results[1].ancestors)
    np.testing.assert_allclose(results[0].images, results[1].images, atol=2e-4)


@pytest.mark.slow
def test_images_of_one_and_two_threads():
    """FLUX img2img, the same generator: natively within rounding of each other, and so are ours."""
    make, call = CALLS["flux_img2img"]
    threads, images = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            images.append(run(make(), call))
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_allclose(*images, atol=1e-5)


@pytest.mark.parametrize("make", [tiny.flux, tiny.sd])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(make, dtype):
    call = tiny.FLUX_CALL if make is tiny.flux else tiny.SD_CALL
    shape = (2, 24, 16) if make is tiny.flux else (2, 4, 8, 12)
    latents = torch.randn(shape, generator=tiny.seeded())
    pipes, images = [make(), make()], []
    for pipe, default in zip(pipes, (torch.float32, dtype), strict=True):
        scheduler = GLASSScheduler.from_scheduler(pipe.scheduler, num_transitions=3)
        scheduler.set_timesteps(6, **({"mu": 0.8} if make is tiny.flux else {}))
        noises = []
        torch.set_default_dtype(default)
        try:
            draw = scheduler._noise.draw
            scheduler._noise.draw = lambda *args, draw=draw, noises=noises: noises.append(draw(*args)) or noises[-1]
            x = latents
            for t in scheduler.timesteps:
                x = scheduler.step(0.3 * x, t, x).prev_sample
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(noise.dtype == torch.float32 and noise.device.type == "cpu" for noise in noises)
        images.append(x)
    assert call
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)


def test_a_row_is_seeded_alone_as_in_a_batch():
    for shape in ((6, 4), (6, 4, 8, 12), (6, 300)):
        x = torch.randn(shape, generator=tiny.seeded())
        assert row_seeds(x[2:3]) == row_seeds(x)[2:3]
        assert len(set(row_seeds(torch.cat([x, x])))) == 12  # equal rows part ways
        assert len(set(row_seeds(x)) | set(row_seeds(x, stream=(1,)))) == 12


def test_fingerprints_tell_rows_apart_and_outlast_rounding():
    x = torch.randn(2000, 4, 8, 12, generator=tiny.seeded())
    seeds = row_seeds(x)
    assert len(set(seeds)) == 2000
    rounded = row_seeds(x + 1e-6 * torch.randn(x.shape, generator=tiny.seeded(1)))
    assert sum(a != b for a, b in zip(seeds, rounded, strict=True)) <= 2
    other = row_seeds(x + 0.5 * torch.randn(x.shape, generator=tiny.seeded(1)))
    assert sum(a != b for a, b in zip(seeds, other, strict=True)) > 1990


def test_noise_the_host_adds_counts_only_where_it_has_the_rows_of_the_run():
    source, x = NoiseSource(), torch.randn(3, 4, 8, 12, generator=tiny.seeded())
    few = torch.randn(2, 4, 8, 12, generator=tiny.seeded(1))
    source.added(few, few)
    source.begin(x, None)
    by_latents = source.draw(x, None)
    source.reset()
    source.begin(x, None)
    assert torch.equal(source.draw(x, None), by_latents)
    source.reset()
    noise = torch.randn(3, 4, 8, 12, generator=tiny.seeded(1))
    source.added(noise, x)
    source.begin(x.flatten(1).flip(1).view(x.shape), None)  # in another order, as packed into tokens
    by_noise = source.draw(x, None)
    assert not torch.equal(by_noise, by_latents)
    for other in (torch.zeros_like(x), 1.1 * x, x + 0.2):  # added to something else, such as a preview
        source.reset()
        source.added(noise, other)
        source.begin(x, None)
        assert torch.equal(source.draw(x, None), by_latents)


VIDEOS = [
    "LTXImageToVideoPipeline",
    "WanVideoToVideoPipeline",
    "CogVideoXVideoToVideoPipeline",
    "QwenImageImg2ImgPipeline",
]


@pytest.mark.slow
@pytest.mark.parametrize("label", VIDEOS)
def test_other_pipelines_that_compute_their_latents(label):
    case, outputs = cases()[label], []
    for size in (0.0, 1e-6):
        pipe = case.build()
        pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler, num_transitions=2)
        step, generator = pipe.scheduler.step, tiny.seeded(99)
        begun = []

        def stepping(output, t, sample, *args, step=step, size=size, generator=generator, begun=begun, **kwargs):
            if not begun:  # the latents a run begins with, as rounded elsewhere
                begun.append(1)
                sample = sample + size * torch.randn(sample.shape, generator=generator).to(sample)
            return step(output, t, sample, *args, **kwargs)

        pipe.scheduler.step = stepping
        out = pipe(**arguments(case))
        outputs.append(np.asarray(next(iter(out.values()))))
    np.testing.assert_allclose(*outputs, atol=1e-3)
