"""What is best is up to the target, of negative scales too; and nothing is moved where nothing random follows."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

import tiny
from glassflows import BeamSearch, BestOfN, FeynmanKac, FeynmanKacSteerer, GLASSScheduler, Steerer
from glassflows.host.run import PipelineRun
from glassflows.scheduler import TransitionHook
from glassflows.smc.weights import log_mean, normalise
from glassflows.steering import Decision, Outcome

PROMPTS = ["a cat", "a dog"]


def darkness(images, prompts):
    return -tiny.brightness(images, prompts)


# ---- the target of a negative scale ----------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["all", "best", "sample"])
@pytest.mark.parametrize("strategy", [FeynmanKac, BestOfN])
def test_a_negative_scale_is_the_negated_reward(flux, strategy, select):
    """−λ and r are λ and −r: the same images in the same order, lineages, weights, and best."""

    def steer(reward, scale):
        steerer = Steerer(flux.pipe, reward, strategy(reward_scale=scale), 4, num_transitions=3)
        return steerer(select=select, **flux.arguments(PROMPTS))

    brightest, darkest, same = steer(tiny.brightness, 1.0), steer(tiny.brightness, -1.0), steer(darkness, 1.0)
    assert np.array_equal(darkest.images, same.images)
    assert torch.equal(darkest.order, same.order)
    assert torch.equal(darkest.log_weights, same.log_weights)
    assert torch.equal(darkest.image_rewards, -same.image_rewards)
    assert torch.equal(darkest.best, same.best)
    assert not torch.equal(darkest.best, brightest.best)
    for prompt in range(2):
        assert darkest.lineage(prompt) == same.lineage(prompt)
        assert darkest.rewards[prompt, darkest.lineage(prompt)[-1]] == darkest.rewards[prompt].min()
    if select != "sample":
        assert torch.equal(darkest.image_rewards.view(2, -1)[:, 0], darkest.rewards.amin(1))


def test_a_schedule_aims_where_it_ends(flux):
    """On the way the scale may have another sign."""
    out = flux.steer(reward_scale=[0.1, 0.1, -1.0], ess_threshold=0)
    assert int(out.best) == int(out.rewards.argmin())


@pytest.mark.parametrize("scale", [0.0, 1.0, "auto"])
def test_other_scales_follow_the_reward(flux, scale):
    out = flux.steer(reward_scale=scale)
    assert torch.equal(out.best, out.rewards.argmax(1))


def test_a_search_follows_the_reward(flux):
    out = Steerer(flux.pipe, tiny.brightness, BeamSearch(), 4, num_transitions=3)(**flux.arguments(PROMPTS))
    assert out.reward_scale.isnan().all()
    assert torch.equal(out.best, out.rewards.argmax(1))


@pytest.mark.parametrize(("scale", "best"), [(-1.0, torch.amin), (1.0, torch.amax)])
def test_the_bar_shows_the_best(flux, monkeypatch, scale, best):
    shown = []
    monkeypatch.setattr(PipelineRun, "show", lambda self, **values: shown.append(float(values["reward"])))
    out = flux.steer(PROMPTS, reward_scale=scale)
    assert shown == pytest.approx(best(out.scored, (1, 2)).tolist(), rel=1e-3)


def test_the_figure_shows_the_best(flux):
    """The red curve is that of the lowest rewards."""
    out = flux.steer(reward_scale=-1.0)
    _, best = out.plot().axes[2].lines
    assert [*best.get_xdata()] == [*out.scored[:, 0].amin(1).tolist(), float(out.rewards.min())]


# ---- where nothing random follows ------------------------------------------------------------------------------------

SD = DDIMScheduler(**tiny.SD_SCHEDULER)  # whose last sample is still noisy
FLOW = FlowMatchEulerDiscreteScheduler()


class Copying(TransitionHook):
    """Lets both rows go on from the first at one boundary."""

    def __init__(self, index):
        self.index = index
        self.told = []

    def at_boundary(self, at, x_t, z):
        self.told.append(at)
        return torch.tensor([0, 0]) if at.index == self.index else None


def run(native, steps, index, **options):
    """Return the last latents of two rows that are one from a boundary on, and what was told of the boundaries."""
    scheduler = GLASSScheduler.from_scheduler(native, **options)
    scheduler.set_timesteps(steps)
    scheduler.hook = hook = Copying(index)
    generators = [tiny.seeded(1), tiny.seeded(2)]
    x = torch.randn(2, 5, 3, generator=tiny.seeded(0))
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x), t, x, generators, return_dict=False)[0]
    return x, hook.told


CASES = {
    "calls within": (FLOW, 6, {"num_transitions": 3}),
    "one call each": (FLOW, 4, {"num_transitions": 4}),
    "a last one alone": (FLOW, 5, {"num_transitions": 3, "correlation": 0.3}),
    "deterministic": (FLOW, 4, {"num_transitions": 4, "correlation": 1.0}),
    "opposite": (FLOW, 4, {"num_transitions": 4, "correlation": -1.0}),
    "deterministic ends": (FLOW, 5, {"num_transitions": 5, "correlation": [0.0, 0.3, 1.0, 0.3, 1.0]}),
    "one": (FLOW, 3, {"num_transitions": 1}),
    "posterior of one call": (FLOW, 1, {"num_transitions": 1, "first_transition": "posterior"}),
    "posterior": (FLOW, 3, {"num_transitions": 2, "first_transition": "posterior"}),
    "noise at the end": (SD, 4, {"num_transitions": 4}),
    "paper's grid": (FLOW, 4, {"num_transitions": 3, "inner_grid": "condot"}),
}


@pytest.mark.parametrize("case", CASES)
def test_boundaries_tell_whether_noise_still_matters(case):
    """If and only if, two rows that are one from there on part ways."""
    native, steps, options = CASES[case]
    number = options["num_transitions"]
    for index in range(number):
        x, told = run(native, steps, index, **options)
        assert len(told) == number
        assert told[index].stochastic == (not torch.equal(x[0], x[1])), index


def test_a_last_transition_of_one_call_moves_nothing(flux):
    """Four images stay four; what is scored there counts, though, as if nothing had been said."""
    out = flux.steer(num_inference_steps=3, num_transitions=3, reward_scale=1.0, ess_threshold=1.0, select="all")
    assert out.transitions == (1, 2)
    assert out.resampled[:, 0].tolist() == [True, False]
    assert out.ancestors[1, 0].tolist() == [0, 1, 2, 3]
    apart = np.abs(out.images[:, None] - out.images[None]).max((2, 3, 4))
    assert apart[np.triu_indices(4, 1)].min() > 1e-4
    before = out.scored[0].gather(1, out.ancestors[0])
    torch.testing.assert_close(out.log_weights, normalise(out.rewards - before))
    torch.testing.assert_close(out.log_evidence, log_mean(out.scored[0]) + log_mean(out.rewards - before))


def test_a_last_transition_of_several_calls_moves(flux):
    out = flux.steer(num_inference_steps=6, num_transitions=3, reward_scale=1.0, ess_threshold=1.0)
    assert out.resampled.all()


def test_a_beam_is_not_copied_at_the_end(flux):
    steerer = Steerer(flux.pipe, tiny.brightness, BeamSearch(width=2), 4, num_transitions=3)
    out = steerer(**flux.arguments(num_inference_steps=3))
    assert out.transitions == (1,)
    apart = np.abs(out.images[:, None] - out.images[None]).max((2, 3, 4))
    assert apart[np.triu_indices(4, 1)].min() > 1e-4
    assert steerer(**flux.arguments(num_inference_steps=6)).transitions == (1, 2)


def test_strategies_are_told(flux):
    """One of a user's own decides for itself."""
    told = []

    class Mine:
        def due(self, at):
            told.append(at.stochastic)
            return True

        def init(self, groups, particles):
            return None

        def step(self, state, rewards, at, generators):
            return state, Decision.keep(rewards)._replace(
                ancestors=torch.zeros_like(rewards).long(), resampled=torch.ones(len(rewards), dtype=torch.bool)
            )

        def finish(self, state, rewards, total):
            return Outcome.without_law(rewards)

    out = Steerer(flux.pipe, tiny.brightness, Mine(), 4, num_transitions=3)(**flux.arguments(num_inference_steps=3))
    assert told == [True, False]
    assert all(np.array_equal(image, out.images[0]) for image in out.images)


class Exact(DiffusionPipeline):
    """Draws numbers z ~ N(0, 1) by their exact denoiser D(x, t) = t x / (t² + (1 − t)²)."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def __call__(self, prompt, num_images_per_prompt=1, num_inference_steps=50, generator=None, output_type="np"):
        prompts = 1 if isinstance(prompt, str) else len(prompt)
        x = randn_tensor((prompts * num_images_per_prompt, 1), generator=generator)
        self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps))
        for told in self.scheduler.timesteps:
            sigma = float(told) / 1000
            t, z = 1 - sigma, x.double()
            velocity = (z - t * z / (t**2 + sigma**2)) / sigma
            x = self.scheduler.step(velocity.float(), told, x, return_dict=False)[0]
        return (x.numpy() if output_type == "np" else x,)


def exact(seed, particles, scale=1.0):
    pipe = Exact(FlowMatchEulerDiscreteScheduler())
    steerer = FeynmanKacSteerer(
        pipe, lambda z, prompts: z.flatten(), particles, reward_scale=scale, decode=lambda z: z, num_transitions=6,
        ess_threshold=1.0,
    )  # fmt: skip
    return steerer("", num_inference_steps=6, generator=tiny.seeded(seed), output_type="np")


def chained_variance(steps):
    """Variance of DDPM's ancestral chain of one-call transitions for D exact: each step is linear in x, plus noise."""
    sigmas = [*np.linspace(1, 1 / steps, steps), 0.0]
    variance = 1.0
    for k, (s, s_next) in enumerate(pairwise(sigmas)):
        a, a_next = 1 - s, 1 - s_next
        slope = a / (a**2 + s**2)  # of the denoised prediction
        if k == 0:  # an ODE step from pure noise: x' = a' ẑ + s' x/s
            variance *= (a_next * slope + s_next / s) ** 2
            continue
        rho = a * s_next / (s * a_next)
        gamma = rho * s_next / s
        weight = a_next - gamma * a
        variance = (gamma + weight * slope) ** 2 * variance + s_next**2 * (1 - rho**2)
    return variance


@pytest.mark.slow
def test_the_law_of_one_call_each_is_exact():
    """N(0, V) tilted by e^x has mean V, and log Z = V/2, of the chain's own V; also though nothing moves at the end."""
    own = chained_variance(6)
    assert float(exact(0, 30_000, scale=0.0).rewards.var()) == pytest.approx(own, rel=0.035)
    runs = [exact(seed, 1000) for seed in range(16)]
    assert all(not out.resampled[-1].any() and out.resampled[:-1].all() for out in runs)
    means = [float((out.log_weights.exp() * out.rewards).sum()) for out in runs]
    evidences = [float(out.log_evidence) for out in runs]
    assert abs(np.mean(means) - own) < 4 * np.std(means) / math.sqrt(16)
    assert abs(np.mean(evidences) - own / 2) < 4 * np.std(evidences) / math.sqrt(16)
