"""Twisted transitions: closed forms through the public call, wrong weights that they reject, real pipelines."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor

import tiny
from glassflows import BeamSearch, BestOfN, FeynmanKacSteerer, GLASSScheduler, Steerer, Twist
from glassflows.flow.noise import RectifiedFlow
from glassflows.flow.transition import transition
from glassflows.scheduler.hooks import Boundary
from glassflows.smc.weights import normalise
from glassflows.steering import population, proposals
from oracles import GaussianMixture
from test_exact import Exact, steer

GROUPS = 512


def weighted_mean(out, values):
    """Return the mean of values, shape (P, K), by the final weights of each group."""
    return (normalise(out.log_weights).exp() * values).sum(-1)


def deviation(values, exact):
    """Return how many standard errors the mean of values is off."""
    return float((values.mean() - exact) / (values.std() / math.sqrt(len(values))))


@cache
def evidence():
    """log E[exp(2 z)] of the discretised sampler, 2 Var, from more draws than a test's own."""
    return 2 * float(steer(7, 500_000, reward_scale=0.0).rewards.var())


def off(out, exact):
    """Return by how many standard errors E[Ẑ] misses Z = exp(λ² Var / 2)."""
    return deviation((out.log_evidence - exact).exp(), 1.0)


# ---- closed forms --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("particles", [4, 8])
def test_tilted_gaussian(particles):
    """N(0, 1) tilted by e^(2z): mean and log Z are 2 Var, and log Ẑ scatters a third as much, or less, as plainly."""
    plain, twisted = (steer(0, particles, prompt=["x"] * GROUPS, twist=twist) for twist in (0.0, 1.0))
    assert weighted_mean(twisted, twisted.rewards).mean() == pytest.approx(evidence(), abs=0.1)
    assert twisted.log_evidence.mean() == pytest.approx(evidence(), abs=0.1)
    assert abs(off(twisted, evidence())) < 3
    assert twisted.log_evidence.std() < plain.log_evidence.std() / 3


WRONG = {
    "no weight": lambda mean, noise: proposals.log_ratio(0 * mean, noise),
    "the other sign": lambda mean, noise: -proposals.log_ratio(mean, noise),
    "ξ for ε̄": lambda mean, noise: proposals.log_ratio(mean, noise - mean),
    "without the square": lambda mean, noise: -(mean * noise).flatten(1).sum(1).cpu().double(),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_weights_are_seen(wrong, monkeypatch):
    monkeypatch.setattr(population, "log_ratio", WRONG[wrong])
    out = steer(0, 8, prompt=["x"] * GROUPS, twist=1.0)
    assert abs(off(out, evidence())) > 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"correlation": 0.3},
        {"correlation": -0.5},
        {"num_transitions": 10, "steps": 10},  # one call each
        {"order": 1},
        {"ess_threshold": 1.0, "resampling": "multinomial"},
        {"start": 0.6},
        {"potential": "max"},
    ],
    ids=str,
)
def test_evidence_whatever_the_transitions(options):
    """E[Ẑ] = E[exp(z)] of the same sampler, unsteered."""
    sampler = {key: options[key] for key in ("correlation", "num_transitions", "steps", "order") if key in options}
    plain = steer(5, 100_000, reward_scale=0.0, **sampler)
    exact = float(plain.rewards.exp().mean().log())
    out = steer(0, 8, prompt=["x"] * GROUPS, twist=0.7, reward_scale=1.0, **options)
    assert abs(off(out, exact)) < 3.5  # the reference scatters, too
    assert (
        out.log_evidence.std()
        < 0.8 * steer(0, 8, prompt=["x"] * GROUPS, reward_scale=1.0, **options).log_evidence.std()
    )


@pytest.mark.slow
def test_two_groups_of_different_tilts():
    """Prompts "up" and "down" tilt by e^(2z) and e^(−z)."""
    tilts = {"up": 2.0, "down": -1.0}

    def tilt(z, prompts):
        return z.flatten() * torch.tensor([tilts[prompt] for prompt in prompts])

    out = steer(0, 8, prompt=["up", "down"] * GROUPS, twist=1.0, reward=tilt, reward_scale=1.0)
    for group, slope in enumerate(tilts.values()):
        log_evidence = out.log_evidence[group::2]
        exact = slope**2 * evidence() / 4
        assert abs(deviation((log_evidence - exact).exp(), 1.0)) < 3
        z = out.rewards[group::2] / slope
        mean = (normalise(out.log_weights[group::2]).exp() * z).sum(-1).mean()
        assert mean == pytest.approx(slope * evidence() / 2, abs=0.06)


@pytest.mark.slow
def test_any_mean_leaves_the_law(monkeypatch):
    """With a random m the mean and E[Ẑ] stay, and log Ẑ scatters more."""
    generator = tiny.seeded(3)

    def anything(self, gradient, scale, at):
        return torch.randn(gradient.shape, generator=generator) / 2

    plain = steer(0, 32, prompt=["x"] * GROUPS, reward_scale=1.0)
    monkeypatch.setattr(Twist, "mean", anything)
    out = steer(0, 32, prompt=["x"] * GROUPS, reward_scale=1.0, twist=1.0)
    assert abs(off(out, evidence() / 4)) < 3
    assert weighted_mean(out, out.rewards).mean() == pytest.approx(evidence() / 2, abs=0.1)
    assert out.log_evidence.std() > 1.1 * plain.log_evidence.std()


CLOUD = GaussianMixture(
    torch.randn(10, 16, generator=tiny.seeded(1), dtype=torch.float64),
    torch.randn(10, generator=tiny.seeded(2), dtype=torch.float64).softmax(0),
    0.3,
)
CENTRE = torch.randn(16, generator=tiny.seeded(4))


def nearness(z, prompts):
    return -(z - CENTRE).square().sum(1) / 8


@pytest.mark.slow
def test_mixture_in_16_dimensions():
    """A mixture tilted by a quadratic reward: E[Ẑ] of the sampler's own law, and tighter than plainly."""
    options = {"denoiser": CLOUD, "dimension": 16, "steps": 20, "reward": nearness, "reward_scale": 2.0}
    draws = steer(5, 60_000, **options | {"reward_scale": 0.0}).rewards
    exact = float((2 * draws).exp().mean().log())
    plain, twisted = (steer(0, 8, prompt=["x"] * 1024, **options, twist=twist) for twist in (0.0, 0.5))
    assert abs(off(twisted, exact)) < 3.5
    assert twisted.log_evidence.std() < 0.9 * plain.log_evidence.std()
    tilted = float((draws * (2 * draws).softmax(-1)).sum())
    assert weighted_mean(twisted, twisted.rewards).mean() == pytest.approx(tilted, abs=0.15)


class ExactNative(Exact):
    """Draws z ~ N(0, σ_data²) by the exact denoiser under any native: the network's output is what gives ẑ."""

    def __call__(self, prompt, num_images_per_prompt=1, num_inference_steps=50, generator=None, output_type="np"):
        x = randn_tensor((len(prompt) * num_images_per_prompt, 1), generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            level, native = self.scheduler._timetable._levels[i], self.scheduler._native
            z = level.alpha * x / (level.alpha**2 + level.sigma**2)
            at_0, at_1 = (native.denoised(torch.full_like(x, output), x, level) for output in (0.0, 1.0))
            x = self.scheduler.step((z - at_0) / (at_1 - at_0), t, x, return_dict=False)[0]
        return (x,)


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NATIVES = {
    "table": (DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False), 1.0),
    "table, v": (DDIMScheduler(**SD, clip_sample=False, prediction_type="v_prediction"), 1.0),
    "sigmas": (EulerDiscreteScheduler(**SD), 1.0),
    "sigmas of EDM": (EDMDPMSolverMultistepScheduler(), 0.5),
    "flow": (FlowMatchEulerDiscreteScheduler(shift=3.0), 1.0),
}


def steer_natively(native, particles, groups, spread, **options):
    """Return a result of z ~ N(0, spread²) tilted by e^(λ z / spread)."""
    pipe = ExactNative(native)
    pipe.scheduler = GLASSScheduler.from_scheduler(native)
    pipe.scheduler.set_generator(tiny.seeded(9))
    options = {"decode": lambda z: z, "start": 0.0} | options
    steerer = FeynmanKacSteerer(pipe, lambda z, prompts: z.flatten() / spread, particles, **options)
    return steerer(["x"] * groups, num_inference_steps=40, generator=tiny.seeded(0), output_type="latent")


@pytest.mark.slow
@pytest.mark.parametrize("name", NATIVES)
def test_natives(name):
    native, spread = NATIVES[name]
    own = float(steer_natively(native, 100_000, 1, spread, reward_scale=0.0).rewards.var())
    out = steer_natively(native, 8, GROUPS, spread, reward_scale=1.5, twist=1.0)
    assert abs(off(out, 1.5**2 * own / 2)) < 3.5
    assert out.log_evidence.std() < 0.4  # plainly .7
    assert weighted_mean(out, out.rewards).mean() == pytest.approx(1.5 * own, abs=0.08)


# ---- what would be wrong, in each of these settings ----------------------------------------------

CLOUDY = {"denoiser": CLOUD, "dimension": 16, "steps": 20, "reward": nearness}
EDM = NATIVES["sigmas of EDM"][0]
SETTINGS = {
    "ρ = .3": lambda: (steer(0, 8, prompt=["x"] * GROUPS, twist=1.0, correlation=0.3), 2 * variance_at(0.3)),
    "16 dimensions": lambda: (
        steer(0, 8, prompt=["x"] * GROUPS, twist=0.5, **CLOUDY | {"reward_scale": 2.0}), cloud_evidence(),
    ),
    "two tilts": lambda: (two_tilts(), evidence() / 4 * 0.49),
    "EDM": lambda: (steer_natively(EDM, 8, GROUPS, 0.5, reward_scale=1.5, twist=1.0), 1.5**2 / 2 * variance_of_edm()),
}  # fmt: skip


@cache
def variance_at(correlation):
    return float(steer(5, 200_000, reward_scale=0.0, correlation=correlation).rewards.var())


@cache
def variance_of_edm():
    return float(steer_natively(EDM, 100_000, 1, 0.5, reward_scale=0.0).rewards.var())


@cache
def cloud_evidence():
    draws = steer(5, 60_000, **CLOUDY | {"reward_scale": 0.0}).rewards
    return float((2 * draws).exp().mean().log())


def two_tilts():
    """Return the groups of the weaker tilt, e^(.7 z), beside one of e^(−2 z)."""

    def tilt(z, prompts):
        return z.flatten() * torch.tensor([{"up": 0.7, "down": -2.0}[prompt] for prompt in prompts])

    out = steer(0, 8, prompt=["up", "down"] * GROUPS, twist=1.0, reward=tilt, reward_scale=1.0)
    return replace(out, log_evidence=out.log_evidence[::2])


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [None, "no weight", "ξ for ε̄"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_each_setting_sees_a_wrong_weight(setting, wrong, monkeypatch):
    if wrong is not None:
        monkeypatch.setattr(population, "log_ratio", WRONG[wrong])
    out, exact = SETTINGS[setting]()
    misses = abs(off(out, exact))
    assert misses < 3.5 if wrong is None else misses > 5


# ---- the equation --------------------------------------------------------------------------------


def boundary(t=0.4, t_next=0.6, data_scale=1.0):
    chosen = transition(RectifiedFlow().level(t), RectifiedFlow().level(t_next), "ddpm")
    return Boundary(2, 5, chosen.t, num_calls=20, transition=chosen, data_scale=data_scale)


@pytest.mark.parametrize("t_next", [0.6, 1.0])
def test_mean(t_next):
    """m = s λ_r v λ̄ / √(1 + v λ̄²) ∇r, √v at λ̄ = ∞, in units of ẑ as the hook gets it."""
    at = boundary(t_next=t_next, data_scale=0.5)
    v, lam_end = 1 / (1 + at.level.snr), at.lam_end
    assert math.isinf(lam_end) == (t_next == 1)
    response = math.sqrt(v) if math.isinf(lam_end) else v * lam_end / math.sqrt(1 + v * lam_end**2)
    gradient = torch.tensor([[0.3, -0.1], [0.0, 0.2]])
    m = Twist(0.7).mean(gradient, torch.tensor([2.0, -1.0]).double(), at)
    expected = 0.7 * 0.5 * response * torch.tensor([[2.0], [-1.0]]) * gradient
    torch.testing.assert_close(m, expected)


def test_limit():
    gradient = torch.tensor([[30.0, 40.0], [0.0, 0.0], [0.03, 0.04]])
    m = Twist(1.0, limit=1.5).mean(gradient, torch.ones(3).double(), boundary())
    assert m[0].tolist() == pytest.approx([0.9, 1.2])
    assert m[1].tolist() == [0.0, 0.0]
    assert 0 < m[2].norm() < 0.05


def test_log_ratio():
    """log N(ε̄; 0, I) − log N(ε̄; m, I), by torch's own densities."""
    mean, noise = torch.randn(2, 5, 3, 6, generator=tiny.seeded(0)).double()
    law = torch.distributions.Normal
    expected = (law(torch.zeros(()), 1.0).log_prob(noise) - law(mean, 1.0).log_prob(noise)).flatten(1).sum(1)
    torch.testing.assert_close(proposals.log_ratio(mean, noise), expected)


# ---- real pipelines ------------------------------------------------------------------------------


def red(images, prompts):
    return 1000 * (images[:, 0] - images[:, 1]).flatten(1).mean(1)


MAKES = [tiny.flux, tiny.sd, tiny.flux_img2img, tiny.sd_inpaint]


@pytest.mark.parametrize("make", MAKES)
def test_twisting_raises_the_reward_of_real_pipelines(make):
    """Nothing is resampled: what rises is due to where particles move."""
    options = {"reward": red, "num_particles": 8, "reward_scale": 1.0, "ess_threshold": 0.0, "num_inference_steps": 9}
    plain, twisted = (tiny.Toy(make).steer(**options, twist=twist) for twist in (0.0, 1.0))
    differences = twisted.rewards - plain.rewards  # the same noise otherwise
    assert differences.mean() > 3 * differences.std() / math.sqrt(8)
    assert (plain.ledger.gradients, twisted.ledger.gradients) == (0, 16)  # particles × transitions after the first
    assert plain.ledger.network_calls == twisted.ledger.network_calls
    assert not torch.equal(plain.log_weights, twisted.log_weights)


def test_no_twist_is_no_twist():
    assert tiny.Toy(tiny.flux).steer(reward=red, twist=0.0) == tiny.Toy(tiny.flux).steer(reward=red)


@pytest.mark.parametrize("make", MAKES[:2])
def test_gradient_through_the_decoder(make, monkeypatch):
    """The gradient is that of the reward of decoded predictions: against differences in double precision."""
    toy, seen = tiny.Toy(make), {}
    toy.pipe.vae.double()

    def watched(self, gradient, scale, at):
        seen["gradient"] = gradient
        return torch.zeros_like(gradient)

    graded = population.Scorer.graded

    def noting(self, latents, dtype, keep=False):
        if "z" not in seen:
            direction = torch.randn(latents.shape, generator=tiny.seeded(5)) / latents[0].numel() ** 0.5
            seen["z"] = latents.clone()
            values = [red(self.decode(latents.double() + h * direction), None) for h in (0.05, -0.05)]
            seen["slope"], seen["direction"] = (values[0] - values[1]) / 0.1, direction
        return graded(self, latents, dtype, keep)

    monkeypatch.setattr(Twist, "mean", watched)
    monkeypatch.setattr(population.Scorer, "graded", noting)
    toy.steer(reward=red, twist=1.0, num_transitions=2, ess_threshold=0.0, output_type="latent")
    slope = (seen["gradient"] * seen["direction"]).flatten(1).sum(1)
    torch.testing.assert_close(slope.double(), seen["slope"].double(), rtol=1e-2, atol=1e-3)


def test_batch_sizes_change_nothing():
    options = {"reward": red, "reward_scale": 1.0, "twist": 1.0, "previews": True}
    whole = tiny.Toy(tiny.flux).steer(["a cat", "a dog"], **options)
    parts = tiny.Toy(tiny.flux).steer(["a cat", "a dog"], **options, decode_batch_size=3, reward_batch_size=2)
    torch.testing.assert_close(parts.rewards, whole.rewards, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(parts.log_weights, whole.log_weights, rtol=1e-3, atol=1e-2)
    assert torch.equal(parts.ancestors, whole.ancestors)
    assert parts.ledger == whole.ledger
    assert (parts.previews.int() - whole.previews.int()).abs().max() <= 1


def test_a_batch_is_its_singles():
    toy, options = tiny.Toy(tiny.sd), {"reward": red, "reward_scale": 1.0, "twist": 1.0, "generator": None}
    latents = toy.latents(8)
    both = toy.steer(["a cat", "a dog"], latents=latents, **options)
    for i, prompt in enumerate(["a cat", "a dog"]):
        alone = toy.steer(prompt, latents=latents[4 * i :][:4], **options)
        torch.testing.assert_close(both.rewards[i], alone.rewards[0], rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(both.log_weights[i], alone.log_weights[0], rtol=1e-3, atol=1e-2)


def test_in_inference_mode():
    plain, toy = tiny.Toy(tiny.flux).steer(reward=red, twist=1.0, reward_scale=1.0), tiny.Toy(tiny.flux)
    with torch.inference_mode():
        inside = toy.steer(reward=red, twist=1.0, reward_scale=1.0)
    torch.testing.assert_close(inside.rewards, plain.rewards, rtol=1e-4, atol=1e-2)
    assert inside.ledger.gradients == 8


def test_gradient_checkpointing_of_the_decoder():
    plain = tiny.Toy(tiny.flux).steer(reward=red, twist=1.0, reward_scale=1.0)
    toy = tiny.Toy(tiny.flux)
    toy.pipe.vae.enable_gradient_checkpointing()
    torch.testing.assert_close(toy.steer(reward=red, twist=1.0, reward_scale=1.0).rewards, plain.rewards)


@pytest.mark.parametrize("make", [tiny.flux, tiny.sd])
def test_half_precision(make):
    """In bfloat16 the decoder runs in it, and the gradient comes in float32."""
    toy, seen, mean = tiny.Toy(make), [], Twist.mean

    class Watched(Twist):
        def mean(self, gradient, scale, at):
            seen.append(gradient.dtype)
            return mean(self, gradient, scale, at)

    toy.pipe.to(dtype=torch.bfloat16)
    out = toy.steer(reward=red, twist=Watched(1.0), reward_scale=1.0, num_inference_steps=9)
    assert seen == [torch.float32] * 2
    assert out.rewards.isfinite().all()


def test_an_autoencoder_that_overflows_stays_upcast_until_its_gradient_is_taken():
    """SDXL's in float16: without that torch finds weights of another dtype on the way back."""
    toy = tiny.Toy(tiny.sd)
    expected = toy.steer(reward=red, twist=1.0, reward_scale=1.0, num_inference_steps=9)
    assert toy.pipe.vae.config.force_upcast
    toy.pipe.vae.half()
    out = toy.steer(reward=red, twist=1.0, reward_scale=1.0, num_inference_steps=9, output_type="latent")
    assert toy.pipe.vae.dtype == torch.float16
    torch.testing.assert_close(out.rewards, expected.rewards, rtol=0.02, atol=0.5)


def test_small_gradients_in_half_precision():
    """An autoencoder in float16 that is not upcast: a gradient below 2⁻²⁴ a pixel would vanish."""
    seen = []

    class Watched(Twist):
        def mean(self, gradient, scale, at):
            seen.append(gradient)
            return 0 * gradient

    options = {"reward": lambda images, prompts: 1e-4 * red(images, prompts) / 1000, "twist": Watched(1.0)}
    for dtype in (torch.float32, torch.float16):
        toy = tiny.Toy(tiny.sd)
        toy.pipe.vae.register_to_config(force_upcast=False)
        toy.pipe.to(dtype=dtype)
        latents = toy.latents(4).to(dtype)
        toy.steer(latents=latents, generator=None, ess_threshold=0.0, reward_scale=1e6, num_transitions=2, **options)
    exact, half = seen
    assert half.dtype == torch.float32
    cosines = torch.cosine_similarity(exact.flatten(1), half.flatten(1))
    assert cosines.min() > 0.99
    assert half.norm() / exact.norm() == pytest.approx(1, abs=0.05)


# ---- strategies ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_best_of_n_with_a_law():
    """Its weights make up for the twist, too: E[Ẑ] = Z, and nothing is scored on the way."""
    pipe = Exact(FlowMatchEulerDiscreteScheduler())
    pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler)
    pipe.scheduler.set_generator(tiny.seeded(5))
    steerer = Steerer(pipe, lambda z, _: z.flatten(), BestOfN(2.0), 8, decode=lambda z: z, twist=1.0)
    out = steerer(["x"] * GROUPS, num_inference_steps=50, generator=tiny.seeded(6), output_type="latent")
    assert abs(off(out, evidence())) < 3
    assert out.scored.shape[0] == 0
    assert out.log_evidence.std() < 0.4


def test_a_search_is_twisted_and_not_weighed():
    toy = tiny.Toy(tiny.flux)
    reward = as_red(scale=1.0)
    plain, twisted = (
        Steerer(toy.pipe, reward, BeamSearch(4), 4, num_transitions=3, twist=twist)(**toy.arguments())
        for twist in (0.0, 1.0)
    )
    assert twisted.log_evidence.isnan().all()
    assert torch.equal(twisted.log_weights, plain.log_weights)
    assert twisted.rewards.mean() > plain.rewards.mean()


def as_red(scale):
    """Return a reward with a scale of its own, which a search is twisted by."""

    class Red:
        reward_scale = scale

        def __call__(self, images, prompts):
            return red(images, prompts)

    return Red()


# ---- refusals ------------------------------------------------------------------------------------


PLAIN = torch.nn.Linear(1, 1)  # whose weights have a gradient, but no image


def no_grad_red(images, prompts):
    with torch.no_grad():
        return red(images, prompts)


def endless(images, prompts):
    return red(images, prompts) + (images - images.detach()).abs().sqrt().flatten(1).sum(1)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda images, prompts: red(images, prompts).tolist(), "scores without"),
        (no_grad_red, "scores without"),
        (lambda images, prompts: torch.ones(len(images)), "scores without"),
        (lambda images, prompts: PLAIN(images.detach().flatten(1)[:, :1])[:, 0], "scores without"),
        (endless, "the gradient of the reward in the latents is not finite"),
    ],
    ids=["numbers", "no_grad", "constant", "detached", "infinite"],
)
def test_rewards_without_a_gradient_are_refused(reward, message):
    toy = tiny.Toy(tiny.flux)
    native, before = toy.pipe.scheduler, toy.run()
    with pytest.raises(ValueError, match=message):
        toy.steer(reward=reward, twist=1.0)
    assert toy.pipe.scheduler is native
    assert np.array_equal(toy.run(), before)


@pytest.mark.parametrize("twist", ["much", math.nan, None, True])
def test_options_are_checked(twist):
    with pytest.raises(ValueError, match="twist: expected"):
        tiny.Toy(tiny.flux).steerer(twist=twist)
    with pytest.raises(ValueError, match="limit: expected"):
        Twist(1.0, limit=0)


def test_decoders_without_a_gradient_are_refused(sd):
    with pytest.raises(ValueError, match="twist: expected decode to return images with a gradient"):
        sd.steer(reward=red, twist=1.0, decode=torch.no_grad()(lambda z: z[:, :3].clone()))


def test_rewards_and_decoders_may_write_into_what_they_get(flux):
    """With a twist as without."""

    def writing(z, prompts):
        return z.mul_(2).flatten(1).mean(1) * 100

    options = {"decode": "latents", "reward_scale": 1.0, "twist": 0.5}
    own = flux.steer(reward=lambda z, prompts: (2 * z).flatten(1).mean(1) * 100, **options)
    torch.testing.assert_close(flux.steer(reward=writing, **options).rewards, own.rewards)
    options |= {"decode": lambda z: z.mul_(2)}
    flux.steer(
        reward=lambda z, prompts: z.flatten(1).mean(1), **options | {"reward_scale": 100.0}, output_type="latent"
    )


def test_a_reward_that_is_read_in_inference_mode(flux):
    class Lazy:
        def load(self):
            self.network = torch.nn.Conv2d(3, 4, 3)

        def __call__(self, images, prompts):
            return 100 * self.network(images).square().flatten(1).mean(1)

    with torch.inference_mode():
        out = flux.steer(reward=Lazy(), twist=0.5, reward_scale=1.0)
    assert out.ledger.gradients == 8


def test_out_of_memory_names_the_batch_size(monkeypatch):
    def failing(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.autograd, "grad", failing)
    with pytest.raises(torch.OutOfMemoryError, match="decode_batch_size"):
        tiny.Toy(tiny.flux).steer(reward=red, twist=1.0)
