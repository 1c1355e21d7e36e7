"""Micro-batches of particles inside the pipeline's own loop."""

import time

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


@pytest.mark.parametrize("make", [tiny.flux, tiny.sd])
def test_the_pipelines_own_decoding_keeps_to_the_batch_size(make):
    pipe, images = make(), []
    seen = rows_seen(pipe.vae.decoder)
    call = tiny.FLUX_CALL if make is tiny.flux else tiny.SD_CALL
    for size in (None, 2):
        steerer = FeynmanKacSteerer(pipe, lambda s, p: torch.zeros(5), 5, num_transitions=2, decode_batch_size=size)
        out = steerer("a cat", num_inference_steps=4, generator=tiny.seeded(), output_type="np", **call)
        images.append(out.images)
    assert seen == [5, 5] + [2, 2, 1] * 2
    np.testing.assert_allclose(*images, atol=5e-5)
    assert "decode" not in vars(pipe.vae)


def test_seconds_of_the_networks_are_taken():
    pipe = tiny.flux()
    forward = pipe.transformer.forward

    def slow(*args, **kwargs):
        time.sleep(0.05)
        return forward(*args, **kwargs)

    pipe.transformer.forward = slow
    steerer = FeynmanKacSteerer(pipe, lambda s, p: torch.zeros(4), 4, num_transitions=2)
    seconds = steerer("a cat", num_inference_steps=4, generator=tiny.seeded(), **tiny.FLUX_CALL).ledger.seconds
    assert 0.2 < seconds["network"] < seconds["total"] - seconds["decode"] - seconds["reward"]


@pytest.mark.parametrize("where", ["particle", "decode", "reward", "final decode"])
def test_out_of_memory_says_what_to_lower(where):
    pipe = tiny.flux()

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    options = {"decode": fail} if where == "decode" else {}
    if where == "particle":
        pipe.transformer.forward = fail
    if where == "final decode":
        where, fail = "decode", lambda images, prompts: torch.zeros(4)
        pipe.vae.decode = lambda z, **kwargs: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory."))
        options = {"decode": lambda latents: torch.rand(4, 3, 16, 24)}
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
    """One graph of the size of a chunk, and the images of the eager network, compiled either way."""
    compilations, images = [], []

    def counting(module, inputs):
        compilations.append(1)
        return module.forward

    for compiled in ("no", "wrapped", "in place"):
        pipe = tiny.flux()
        torch._dynamo.reset()
        compilations.clear()
        if compiled == "wrapped":
            pipe.transformer = torch.compile(pipe.transformer, backend=counting, dynamic=False)
        if compiled == "in place":
            pipe.transformer.compile(backend=counting, dynamic=False, fullgraph=True)
        steerer = FeynmanKacSteerer(pipe, lambda s, p: torch.zeros(4), 4, num_transitions=2, particle_batch_size=2)
        out = steerer("a cat", num_inference_steps=4, generator=tiny.seeded(), output_type="np", **tiny.FLUX_CALL)
        images.append(out.images)
        assert len(compilations) == (0 if compiled == "no" else 1)
        np.testing.assert_allclose(images[0], out.images, atol=5e-5)


@pytest.mark.parametrize("size", [None, 2])
def test_interrupted_in_a_network_the_pipeline_is_as_before(size):
    """By the keyboard, in the middle of a call of the network."""
    pipe, calls = tiny.flux(), []
    options = {"num_inference_steps": 4, "output_type": "np", **tiny.FLUX_CALL}
    before = pipe("a cat", generator=tiny.seeded(), **options).images
    attributes, scheduler = dict(vars(pipe)), pipe.scheduler

    def interrupting(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = pipe.transformer.x_embedder.register_forward_pre_hook(interrupting)
    steerer = FeynmanKacSteerer(pipe, lambda s, p: torch.zeros(4), 4, num_transitions=2, particle_batch_size=size)
    with pytest.raises(KeyboardInterrupt):
        steerer("a cat", generator=tiny.seeded(), **options)
    handle.remove()
    assert vars(pipe).keys() == attributes.keys()
    assert pipe.scheduler is scheduler
    assert "forward" not in vars(pipe.transformer)
    assert "decode" not in vars(pipe.vae)
    assert np.array_equal(pipe("a cat", generator=tiny.seeded(), **options).images, before)
