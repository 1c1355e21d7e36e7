"""Steering to closed forms: an exact denoiser in a pipeline of its own, the real scheduler, the real steerer."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

import tiny
from glassflows import FeynmanKacSteerer, GLASSScheduler
from glassflows.smc.weights import normalise
from oracles import GaussianMixture, gaussian

pytestmark = pytest.mark.slow


class Exact(DiffusionPipeline):
    """Draws z of any dimension by the exact denoiser D(x, t) of their law."""

    def __init__(self, scheduler, denoiser=gaussian, dimension=1):
        super().__init__()
        self.register_modules(scheduler=scheduler)
        self.denoiser = denoiser
        self.dimension = dimension

    def __call__(
        self, prompt, num_images_per_prompt=1, num_inference_steps=50, generator=None, output_type="np",
    ):  # fmt: skip
        prompts = 1 if isinstance(prompt, str) else len(prompt)
        x = randn_tensor((prompts * num_images_per_prompt, self.dimension), generator=generator)
        self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps))
        for t in self.scheduler.timesteps:
            s = float(t) / 1000
            velocity = (x.double() - self.denoiser(x.double(), 1 - s)) / s
            x = self.scheduler.step(velocity.float(), t, x, return_dict=False)[0]
        return (x.numpy() if output_type == "np" else x,)


def first(z, prompts):
    """r(z) = z."""
    return z.flatten()


def steer(
    seed, particles=2000, denoiser=gaussian, *, steps=50, prompt: str | list[str] = "", order=2, dimension=1,
    correlation="ddpm", num_transitions=5, **options,
):  # fmt: skip
    pipe = Exact(FlowMatchEulerDiscreteScheduler(), denoiser, dimension)
    pipe.scheduler = GLASSScheduler.from_scheduler(
        pipe.scheduler, num_transitions=num_transitions, solver_order=order, correlation=correlation
    )
    pipe.scheduler.set_generator(tiny.seeded(1000 + seed))  # one for each of many rows takes long
    options = {"reward": first, "reward_scale": 2.0, "start": 0.0, "decode": lambda z: z} | options
    call = {name: options.pop(name) for name in ("record", "select") if name in options}
    steerer = FeynmanKacSteerer(pipe, num_particles=particles, **options)
    return steerer(prompt, num_inference_steps=steps, generator=tiny.seeded(seed), output_type="latent", **call)


def mean(out):
    return float((normalise(out.log_weights).exp() * out.rewards).sum())


@cache
def variance(steps, order):
    """Variance of the discretised, unsteered sampler; of N(0, 1) it maps every draw to a multiple of N(0, 1)."""
    draws = steer(0, 200_000, steps=steps, order=order, reward_scale=0.0)
    return float(draws.rewards.var())


@pytest.mark.parametrize(("order", "low", "high"), [(2, 1.97, 2.01), (1, 1.74, 1.84)])
def test_tilted_gaussian(order, low, high):
    """N(0, 1) tilted by e^(2x): the mean is 2 Var, log Z is 2 Var, Var that of the discretised sampler."""
    own = variance(50, order)
    assert low < 2 * own < high
    runs = [steer(seed, order=order) for seed in range(32)]
    means, evidences = [mean(out) for out in runs], [float(out.log_evidence) for out in runs]
    for values in (means, evidences):
        assert abs(np.mean(values) - 2 * own) < 3 * np.std(values) / math.sqrt(32) + 0.01  # the sampled variance's own


def test_the_discretised_variance_tends_to_one():
    errors = [abs(variance(steps, 2) - 1) for steps in (10, 50)]
    assert errors[1] < errors[0] < 0.2
    assert errors[1] < 0.02


def test_evidence_is_unbiased_with_few_particles():
    """E[Ẑ] = exp(Var/2) for λ = 1, over 4000 groups of 8 particles in one call, within 4 standard errors."""
    out = steer(0, 8, prompt=["x"] * 4000, reward_scale=1.0)
    ratio = (out.log_evidence - variance(50, 2) / 2).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(4000) + 0.005


def test_errors_shrink_like_one_over_the_root_of_the_particles():
    spreads = []
    for particles in (50, 800):
        out = steer(1, particles, prompt=["x"] * 200, steps=10, reward_scale=1.0)
        weights = normalise(out.log_weights).exp()
        spreads.append(float((weights * out.rewards).sum(-1).std()))
    assert spreads[0] / spreads[1] == pytest.approx(4, rel=0.25)


def test_tilted_mixture():
    """A mixture of N(−2, .25) and N(1, .25) with weights .7 and .3, tilted by e^z, keeps its two modes as it should."""
    law = GaussianMixture(torch.tensor([[-2.0], [1.0]]), torch.tensor([0.7, 0.3]), 0.5)
    weights = torch.tensor([0.7, 0.3]).double() * torch.exp(torch.tensor([-2.0, 1.0]).double() + 0.125)
    share = float(weights[1] / weights.sum())
    shares, evidences = [], []
    for seed in range(16):
        out = steer(seed, 1000, law, reward_scale=1.0)
        shares.append(float((normalise(out.log_weights).exp() * (out.rewards > -0.5)).sum()))
        evidences.append(float(out.log_evidence))
    assert abs(np.mean(shares) - share) < 4 * np.std(shares) / 4 + 0.01
    assert abs(np.mean(evidences) - float(weights.sum().log())) < 4 * np.std(evidences) / 4 + 0.02
