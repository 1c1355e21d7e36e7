"""The ledger: what was evaluated how often, and how long it took."""

import time

import pytest
import torch


@pytest.mark.filterwarnings("ignore:.*scored no particles on the way:UserWarning")
def test_the_ledger_adds_up(flux, sd):
    """The last scoring too is within the total; latents are not decoded."""

    def slow(images, prompts):
        time.sleep(0.05)
        return [0.0, 1.0, 2.0, 3.0]

    for options in ({}, {"num_transitions": 1}, {"output_type": "latent"}):
        ledger = flux.steer(reward=slow, **options).ledger
        assert vars(ledger).keys() == {"network_calls", "decodes", "reward_calls", "seconds"}
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
