"""The ledger: what was evaluated how often, and how long it took."""

import time
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

import tiny


@pytest.mark.filterwarnings("ignore:.*scored no particles on the way:UserWarning")
def test_the_ledger_adds_up(flux, sd):
    """The last scoring too is within the total; latents are not decoded."""

    def slow(images, prompts):
        time.sleep(0.05)
        return [0.0, 1.0, 2.0, 3.0]

    for options in ({}, {"num_transitions": 1}, {"output_type": "latent"}):
        ledger = flux.steer(reward=slow, **options).ledger
        assert vars(ledger).keys() == {"network_calls", "decodes", "reward_calls", "gradients", "received", "seconds"}
        seconds = dict(ledger.seconds)
        assert seconds.pop("total") > sum(seconds.values())
        assert seconds["reward"] > 0.05 * ledger.reward_calls / 4
    assert seconds["decode"] > 0
    assert ledger.decodes == 12  # the final ones for the reward
    assert sd.steer(reward=slow, decode="latents").ledger.decodes == 0


def test_seconds_of_the_networks_are_taken(flux):
    forward = flux.network.forward

    def slow(*args, **kwargs):
        time.sleep(0.05)
        return forward(*args, **kwargs)

    flux.network.forward = slow
    out = flux.steer(reward=lambda s, p: torch.zeros(4), num_transitions=2, num_inference_steps=4)
    seconds = out.ledger.seconds
    assert 0.2 < seconds["network"] < seconds["total"] - seconds["decode"] - seconds["reward"]


class Callback(PipelineCallback):
    """One of diffusers' objects, which pipelines know by their class."""

    tensor_inputs: ClassVar = ["latents"]

    def __init__(self, function):
        super().__init__()
        self.function = function

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        assert callback_kwargs.keys() == {"latents"}
        self.function()
        return callback_kwargs


@pytest.mark.slow
@pytest.mark.parametrize("by", ["callback", "object", "objects", "old callback", "on_boundary", "on_denoised"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_other_pipelines_are_not_charged(sd, by):
    """What a function of the user's runs on the same networks: its seconds are its own, and its images as if alone."""
    sd.glass(3)
    other = StableDiffusionPipeline(**sd.pipe.components, requires_safety_checker=False)
    other.scheduler = tiny.sd().scheduler
    other.set_progress_bar_config(disable=True)
    call = sd.arguments("a dog", num_images_per_prompt=4, num_inference_steps=2, seed=5)
    expected, forward, slow, drawn = other(**call).images, sd.network.forward, [], []

    def sleeping(*args, **kwargs):
        time.sleep(0.5 * len(slow))
        return forward(*args, **kwargs)

    sd.network.forward = sleeping

    def running(*args):
        if not drawn:
            slow.append(True)
            drawn.append(other(**sd.arguments("a dog", num_images_per_prompt=4, num_inference_steps=2, seed=5)).images)
            slow.clear()
        return {}

    given = {
        "callback": {"callback_on_step_end": running},
        "object": {"callback_on_step_end": Callback(running)},
        "objects": {"callback_on_step_end": MultiPipelineCallbacks([Callback(running), Callback(lambda: None)])},
        "old callback": {"callback": running, "callback_steps": 1},
    }
    if by in ("on_boundary", "on_denoised"):
        setattr(sd.pipe.scheduler, by, running)
    out = sd.steer(num_transitions=None, particle_batch_size=3, **given.get(by, {}))
    assert len(drawn) == 1
    assert np.array_equal(drawn[0], expected)
    assert 0 < out.ledger.seconds["network"] < 0.8
    assert out.ledger.seconds["total"] > 1
