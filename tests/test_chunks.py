"""Micro-batches of particles inside the pipeline's own loop."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", minversion="0.42")  # older ones build other pipelines

import tiny
from glassflows import FeynmanKacSteerer
from zoo.survey import arguments, cases

# guidance by doubling and by two calls, packed tokens, lists of prompts per row, residuals of a ControlNet, a batch of
# three under PAG, mirrored rows, video
PIPELINES = [
    "FluxPipeline", "FluxControlNetPipeline", "StableDiffusionPipeline", "StableDiffusionControlNetPipeline",
    "StableDiffusionPAGPipeline", "StableDiffusionXLPipeline", "DiTPipeline", "ZImagePipeline", "QwenImagePipeline",
    "WanPipeline, two experts", "LTX2Pipeline",
]  # fmt: skip


def rows_seen(module):
    """Note the rows of every call of a module."""
    seen = []
    module.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("label", PIPELINES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_chunks_change_nothing(label):
    case = cases()[label]
    pipe = case.build()
    options = arguments(case) | {"num_inference_steps": 4}
    prompt = options.pop("prompt", None)
    results = []
    for size in (None, 2, 1):
        steerer = FeynmanKacSteerer(
            pipe, lambda samples, prompts: 100 * samples.flatten(1).mean(1), 5, num_transitions=2, ess_threshold=1.0,
            particle_batch_size=size, reward_scale=1.0,
        )  # fmt: skip
        options["generator"] = tiny.seeded()
        results.append(steerer(prompt, **options))
    whole, *parts = results
    for other in parts:
        assert torch.equal(other.ancestors, whole.ancestors)
        np.testing.assert_allclose(other.images, whole.images, atol=5e-5)
    for name in case.networks:
        assert "forward" not in vars(getattr(pipe, name))


@pytest.mark.parametrize(("make", "copies"), [(tiny.flux, 1), (tiny.sd, 2)])
def test_networks_see_so_many_at_a_time(make, copies):
    pipe = make()
    seen = rows_seen(pipe.transformer.x_embedder if make is tiny.flux else pipe.unet.conv_in)
    steerer = FeynmanKacSteerer(pipe, lambda samples, prompts: torch.zeros(5), 5, particle_batch_size=2)
    call = tiny.FLUX_CALL if make is tiny.flux else tiny.SD_CALL
    steerer("a cat", num_inference_steps=3, generator=tiny.seeded(), **call)
    assert set(seen) == {2 * copies, copies}


@pytest.mark.parametrize("where", ["particle", "decode", "reward"])
def test_out_of_memory_says_what_to_lower(where):
    pipe = tiny.flux()

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    options = {"decode": fail} if where == "decode" else {}
    if where == "particle":
        pipe.transformer.forward = fail
    steerer = FeynmanKacSteerer(pipe, fail, 4, num_transitions=2, **options)
    with pytest.raises(torch.OutOfMemoryError, match=rf"CUDA out of memory\. \(lower {where}_batch_size of Feyn"):
        steerer("a cat", num_inference_steps=4, generator=tiny.seeded(), **tiny.FLUX_CALL)


def test_offloaded_networks_are_chunked():
    """The hooks of offloading are taken off and put on anew within the call."""
    images = []
    for size in (None, 2):
        pipe = tiny.flux()
        pipe.enable_model_cpu_offload(device="cpu")
        steerer = FeynmanKacSteerer(pipe, lambda s, p: torch.zeros(4), 4, num_transitions=2, particle_batch_size=size)
        for _ in range(2):
            out = steerer("a cat", num_inference_steps=4, generator=tiny.seeded(), output_type="np", **tiny.FLUX_CALL)
        images.append(out.images)
    np.testing.assert_allclose(*images, atol=5e-5)


def test_compiled_networks_are_chunked():
    """One graph for the chunks, and the images of the eager network."""
    compilations, images = [], []

    def counting(module, inputs):
        compilations.append(1)
        return module.forward

    for compiled in (False, True):
        pipe = tiny.flux()
        if compiled:
            torch._dynamo.reset()
            pipe.transformer = torch.compile(pipe.transformer, backend=counting, dynamic=False)
        steerer = FeynmanKacSteerer(pipe, lambda s, p: torch.zeros(4), 4, num_transitions=2, particle_batch_size=2)
        out = steerer("a cat", num_inference_steps=4, generator=tiny.seeded(), output_type="np", **tiny.FLUX_CALL)
        images.append(out.images)
    np.testing.assert_allclose(*images, atol=5e-5)
    assert 1 <= len(compilations) <= 2
