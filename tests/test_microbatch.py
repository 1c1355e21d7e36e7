"""Micro-batches of particles inside the pipeline's own loop."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", minversion="0.42")  # older ones build other pipelines

import tiny
from glassflows import MicroBatches
from zoo.survey import arguments, cases

# guidance by doubling and by two calls, packed tokens, lists of prompts per row, residuals of a ControlNet, a batch of
# three under PAG, mirrored rows, video
PIPELINES = [
    "FluxPipeline", "FluxControlNetPipeline", "StableDiffusionPipeline", "StableDiffusionControlNetPipeline",
    "StableDiffusionPAGPipeline", "StableDiffusionXLPipeline", "DiTPipeline", "ZImagePipeline", "QwenImagePipeline",
    "WanPipeline, two experts", "LTX2Pipeline",
]  # fmt: skip


def indifferent(samples, prompts):
    return torch.zeros(len(samples))


def rows_seen(module):
    """Note the rows of every call of a module."""
    seen = []
    module.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def steer(toy, **options):
    return toy.steer(**({"reward": indifferent, "num_transitions": 2, "num_inference_steps": 4} | options))


# ---- the same samples ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("label", PIPELINES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_micro_batches_change_nothing(label):
    case = cases()[label]
    toy = tiny.Toy(case.build, {name: value for name, value in arguments(case).items() if name != "generator"})
    options = {"num_particles": 5, "ess_threshold": 1.0, "reward_scale": 1.0}

    def reward(samples, prompts):
        return 100 * samples.flatten(1).mean(1)

    whole, *parts = (steer(toy, reward=reward, particle_batch_size=size, **options) for size in (None, 2, 1))
    for other in parts:
        assert torch.equal(other.ancestors, whole.ancestors)
        np.testing.assert_allclose(other.images, whole.images, atol=5e-5)
    for name in case.networks:
        assert "forward" not in vars(getattr(toy.pipe, name))


@pytest.mark.parametrize("number", [8, 24])
def test_positions_are_not_rows(flux, number):
    """FLUX is told the positions of 8 tokens of text and 24 of the image, once for as many particles."""
    seen = rows_seen(flux.network.pos_embed)
    whole, parts = (steer(flux, num_particles=number, particle_batch_size=size) for size in (None, 3))
    assert seen == [8 + 24] * (4 + 4 * -(-number // 3))
    np.testing.assert_allclose(parts.images, whole.images, atol=5e-5)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "copies"), [(tiny.flux, 1), (tiny.sd, 2)])
def test_networks_see_so_many_at_a_time(make, copies):
    toy = tiny.Toy(make)
    seen = rows_seen(toy.network.x_embedder if make is tiny.flux else toy.network.conv_in)
    steer(toy, num_particles=5, particle_batch_size=2)
    assert seen == [2 * copies, 2 * copies, copies] * 4


def test_the_pipelines_own_decoding_keeps_to_the_batch_size(toy):
    seen = rows_seen(toy.pipe.vae.decoder)
    whole, parts = (steer(toy, num_particles=5, decode_batch_size=size).images for size in (None, 2))
    assert seen == [5, 5] + [2, 2, 1] * 2
    np.testing.assert_allclose(whole, parts, atol=5e-5)
    assert "decode" not in vars(toy.pipe.vae)


@pytest.mark.parametrize("option", ["particle_batch_size", "decode_batch_size", "reward_batch_size"])
def test_sizes_are_checked(flux, option):
    with pytest.raises(ValueError, match=f"^{option}: expected at least 1, got -1$"):
        flux.steerer(**{option: -1})
    field = {"particle_batch_size": "network"}.get(option, option.removesuffix("_batch_size"))
    with pytest.raises(ValueError, match=f"^{option}: expected at least 1, got 0$"):
        MicroBatches(**{field: 0})


@pytest.mark.parametrize("where", ["particle", "decode", "reward", "final decode"])
def test_out_of_memory_says_what_to_lower(flux, where):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    options = {
        "particle": {},
        "decode": {"decode": fail},
        "reward": {"reward": fail},
        "final decode": {"decode": lambda latents: torch.rand(4, 3, 16, 24)},
    }
    if where == "particle":
        flux.network.forward = fail
    if where == "final decode":
        flux.pipe.vae.decode = fail
    name = where.removeprefix("final ")
    message = f"CUDA out of memory. (lower {name}_batch_size of FeynmanKacSteerer, which is "
    with pytest.raises(torch.OutOfMemoryError, match=re.escape(message)):
        steer(flux, **options[where])


# ---- networks that were changed --------------------------------------------------------------------------------------


def test_offloaded_networks(flux):
    """The hooks of offloading are taken off and put on anew within the call."""
    flux.pipe.enable_model_cpu_offload(device="cpu")
    whole, again, parts, last = (steer(flux, particle_batch_size=size).images for size in (None, None, 2, 2))
    for other in (again, parts, last):
        np.testing.assert_allclose(other, whole, atol=5e-5)


@pytest.mark.slow
def test_compiled_networks():
    """One graph of the size of a micro-batch, and the images of the eager network, compiled either way."""
    compilations, images = [], []

    def counting(module, inputs):
        compilations.append(1)
        return module.forward

    for compiled in ("no", "wrapped", "in place"):
        toy = tiny.Toy(tiny.flux)
        torch._dynamo.reset()
        compilations.clear()
        if compiled == "wrapped":
            toy.pipe.transformer = torch.compile(toy.network, backend=counting, dynamic=False)
        if compiled == "in place":
            toy.network.compile(backend=counting, dynamic=False, fullgraph=True)
        images.append(steer(toy, particle_batch_size=2).images)
        assert len(compilations) == (0 if compiled == "no" else 1)
        np.testing.assert_allclose(images[0], images[-1], atol=5e-5)


@pytest.mark.parametrize("size", [None, 2])
def test_interrupted_in_a_network_the_pipeline_is_as_before(flux, size):
    """By the keyboard, in the middle of a call of the network."""
    pipe, calls, before = flux.pipe, [], flux.run()
    attributes, scheduler = dict(vars(pipe)), pipe.scheduler

    def interrupting(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = pipe.transformer.x_embedder.register_forward_pre_hook(interrupting)
    with pytest.raises(KeyboardInterrupt):
        steer(flux, particle_batch_size=size)
    handle.remove()
    assert vars(pipe).keys() == attributes.keys()
    assert pipe.scheduler is scheduler
    assert "forward" not in vars(pipe.transformer)
    assert "decode" not in vars(pipe.vae)
    assert np.array_equal(flux.run(), before)
