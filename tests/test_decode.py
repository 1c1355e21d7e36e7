"""Decoding: from latents to what the pipeline itself makes of them."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

import tiny
from glassflows import FeynmanKacSteerer
from glassflows.host.decode import PipelineCall, decoder
from zoo import deepfloyd


def test_decodes_as_the_pipeline_does(toy):
    images, latents = (toy.run(output_type=kind, num_images_per_prompt=3) for kind in ("pt", "latent"))
    decoded = decoder(PipelineCall(toy.pipe, toy.call))(latents)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, images)


def test_half_precision_autoencoders_that_overflow_are_upcast(sd):
    """SDXL's own: decoded in float32 and left in half precision."""
    vae, decode = sd.pipe.vae, decoder(PipelineCall(sd.pipe, sd.call))
    latents = torch.randn(2, 4, 8, 12, generator=tiny.seeded()).half()
    vae.half()
    decoded = decode(latents)
    assert vae.dtype == torch.float16
    vae.float()
    assert torch.equal(decoded, decode(latents.float()))


def test_sliced_and_tiled_decoders(toy):
    options = {"reward_scale": 1, "ess_threshold": 1}
    plain = toy.steer(**options)
    toy.pipe.vae.enable_slicing()
    sliced = toy.steer(decode_batch_size=3, **options)
    by_slot = [out.images[out.order[0].argsort()] for out in (sliced, plain)]
    np.testing.assert_allclose(*by_slot, atol=5e-5)
    toy.pipe.vae.enable_tiling()  # which blends tiles: other images, scored as they are returned
    tiled = toy.steer(decode_batch_size=3, **options)
    images = torch.from_numpy(tiled.images).movedim(-1, 1)
    bright = tiny.brightness(images, [""] * 4).double()
    torch.testing.assert_close(bright, tiled.image_rewards, rtol=0, atol=1e-3)
    assert np.abs(tiled.images - plain.images).max() > 1e-3


@tiny.DIFFUSERS_42
def test_pixels_need_no_autoencoder():
    """DeepFloyd IF is steered on its own pixels."""
    case = deepfloyd.CASES[0]
    toy = tiny.Toy(case.build, case.call() | {"output_type": "np"})
    assert toy.steer(num_inference_steps=4, **tiny.SECOND_TAKES_ALL).images.shape == (2, 16, 24, 3)


def test_unknown_pipelines_ask_for_decode():
    """Also where a known pipeline hands its scheduler a part of the sample only."""
    for pipe in (object(), type("LTXImageToVideoPipeline", (), {})()):
        name = type(pipe).__name__
        with pytest.raises(ValueError, match=f"decode: do not know how {name} turns latents into images: pass decode="):
            decoder(PipelineCall(pipe))


def test_unknown_pipelines_are_not_called():
    class Unknown(DiffusionPipeline):
        def __init__(self, scheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)

        def __call__(self, prompt, num_images_per_prompt=1, output_type="pil"):
            raise AssertionError("never reached")

    pipe = Unknown(DDIMScheduler())
    with pytest.raises(ValueError, match="do not know how Unknown turns latents into images: pass decode="):
        FeynmanKacSteerer(pipe, tiny.brightness)("a cat")
    assert isinstance(pipe.scheduler, DDIMScheduler)
