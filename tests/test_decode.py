import pytest
import torch

import tiny
from glassflows.decode import decoder


@pytest.mark.parametrize("make", [tiny.flux, tiny.sd])
def test_decodes_as_the_pipeline_does(make):
    pipe = make()
    call = (tiny.FLUX_CALL if make is tiny.flux else tiny.SD_CALL) | {"num_inference_steps": 2}
    images, latents = (
        pipe("a cat", generator=tiny.seeded(), output_type=kind, num_images_per_prompt=3, **call).images
        for kind in ("pt", "latent")
    )
    decoded = decoder(pipe, call)(latents)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, images)


def test_unknown_packing_asks_for_decode():
    pipe = tiny.flux()
    pipe._unpack_latents = lambda latents, frames: latents
    with pytest.raises(ValueError, match="packs its latents in a way of its own: pass decode="):
        decoder(pipe, tiny.FLUX_CALL)
