import pytest
import torch

import tiny
from glassflows.host.decode import PipelineCall, decoder


@pytest.mark.parametrize("make", [tiny.flux, tiny.sd])
def test_decodes_as_the_pipeline_does(make):
    pipe = make()
    call = (tiny.FLUX_CALL if make is tiny.flux else tiny.SD_CALL) | {"num_inference_steps": 2}
    images, latents = (
        pipe("a cat", generator=tiny.seeded(), output_type=kind, num_images_per_prompt=3, **call).images
        for kind in ("pt", "latent")
    )
    decoded = decoder(PipelineCall(pipe, call))(latents)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, images)


def test_half_precision_autoencoders_that_overflow_are_upcast():
    """SDXL's own: decoded in float32 and left in half precision."""
    pipe = tiny.sd()
    latents = torch.randn(2, 4, 8, 12, generator=tiny.seeded()).half()
    pipe.vae.half()
    decoded = decoder(PipelineCall(pipe, tiny.SD_CALL))(latents)
    assert pipe.vae.dtype == torch.float16
    pipe.vae.float()
    assert torch.equal(decoded, decoder(PipelineCall(pipe, tiny.SD_CALL))(latents.float()))


def test_unknown_pipelines_ask_for_decode():
    """Also where a known pipeline hands its scheduler a part of the sample only."""
    for pipe in (object(), type("LTXImageToVideoPipeline", (), {})()):
        with pytest.raises(ValueError, match="do not know how .* turns latents into images: pass decode="):
            decoder(PipelineCall(pipe))
