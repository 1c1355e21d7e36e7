"""Recorded transitions: the law they are drawn from, the chains they form, the gradients they give."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from scipy.stats import kstest

import tiny
from glassflows import BestOfN, GLASSScheduler, Steerer, SteeringResult, Trajectories
from oracles import gaussian
from test_exact import Exact, first, steer

STEPS = 8


def recorded(seed=0, particles=64, *, steps=STEPS, num_transitions=STEPS, **options):
    """Return the result of a recorded call of the exact denoiser of N(0, 1)."""
    call = {"steps": steps, "num_transitions": num_transitions, "record": True}
    return steer(seed, particles, **(call | {"ess_threshold": 1.0} | options))


def ancestral(x_t, z, s, s_next):
    """Return mean and standard deviation of DDPM's x_t′ given x_t and z, by conditioning on a Markov chain of noise.

    x_t is a noisier x_t′: x_t = a x_t′ + τ η, on the straight path α = 1 − s, σ = s.
    """
    a = (1 - s) / (1 - s_next)
    noisier = s**2 - (a * s_next) ** 2
    precision = 1 / s_next**2 + a**2 / noisier
    mean = ((1 - s_next) * z / s_next**2 + a * x_t / noisier) / precision
    return mean, precision**-0.5


def test_mean_and_standard_deviation_are_those_of_ddpm():
    out = recorded()
    taken, levels = out.trajectories, [1 - k / STEPS for k in range(STEPS)]
    assert taken.steps.tolist() == list(range(1, STEPS - 1))  # neither the first, the ODE's, nor the last, to data
    torch.testing.assert_close(taken.timesteps / 1000, torch.tensor(levels[1:-1]).double())
    for i, step in enumerate(taken.steps.tolist()):
        s, s_next = levels[step], levels[step + 1]
        x_t = taken.x_t[i].double()
        mean, std = ancestral(x_t, gaussian(x_t, 1 - s), s, s_next)
        torch.testing.assert_close(taken.mean[i].double(), mean, atol=1e-6, rtol=1e-5)
        assert float(taken.std[i]) == pytest.approx(std, rel=1e-6)


def test_what_is_drawn_is_normal():
    taken = recorded(particles=2000, reward_scale=0.0).trajectories
    noise = (taken.x_next.double() - taken.mean.double()) / taken.std[:, None, None]
    for one in noise:
        assert kstest(one.flatten().numpy(), "norm").pvalue > 1e-5
    assert kstest((1.1 * noise).flatten().numpy(), "norm").pvalue < 1e-5


def test_log_prob():
    taken = recorded(prompt=["a", "b"], dimension=3, reward=lambda z, prompts: z[:, 0]).trajectories
    law = torch.distributions.Normal(taken.mean.double(), taken.std[:, None, None])
    torch.testing.assert_close(taken.log_prob, law.log_prob(taken.x_next.double()).sum(-1))
    for i, s in enumerate((taken.timesteps / 1000).tolist()):
        z = gaussian(taken.x_t[i].double(), 1 - s).requires_grad_()
        density = taken.log_prob_of(i, z)
        torch.testing.assert_close(density, taken.log_prob[i], atol=1e-4, rtol=0)
        (gradient,) = torch.autograd.grad(density.sum(), z)
        residual = taken.x_next[i].double() - taken.mean[i].double()
        torch.testing.assert_close(gradient, taken.alpha[i] * residual / taken.std[i] ** 2, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"select": "sample"}, {"twist": 1.0}, {"start": 0.5}, {"widths": (64, 32, 8)}])
def test_chains_follow_their_ancestors(options):
    """Where particles were resampled, what an ancestor drew is where its descendant is next."""
    out = recorded(**options) if "twist" not in options else recorded(**options, reward=lambda z, prompts: z[:, 0])
    taken = out.trajectories
    assert out.resampled.any()
    assert taken.x_t.shape[:2] == (STEPS - 2, len(out.images))
    torch.testing.assert_close(taken.x_next[:-1], taken.x_t[1:], atol=1e-5, rtol=1e-5)
    end = gaussian(taken.x_next[-1].double(), 1 - 1 / STEPS).float()  # the last transition ends in ẑ
    torch.testing.assert_close(end, out.latents, atol=1e-5, rtol=1e-5)


def steer_call(seed, particles, denoiser, **options):
    """A recorded chain that draws noise from its first transition on, never resampled."""
    pipe = Exact(FlowMatchEulerDiscreteScheduler(), denoiser)
    pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler, num_transitions=STEPS, first_transition="posterior")
    pipe.scheduler.set_generator(tiny.seeded(seed))
    steerer = Steerer(pipe, first, BestOfN(), particles, decode=lambda z: z)
    call = {"num_inference_steps": STEPS, "output_type": "latent", "generator": tiny.seeded(seed)}
    return steerer("", record=True, **call, **options)


def test_policy_gradients():
    """∂E[z]/∂μ of the sampler of N(μ, 1), by the score function, against a difference of two runs."""

    def shifted(mu):
        return lambda x, t: mu + gaussian(x - t * mu, t)

    number = 20_000
    above, below = (steer_call(1, number, shifted(mu)).rewards.mean() for mu in (0.5, -0.5))
    out = steer_call(2, number, shifted(0.0))
    taken, mu = out.trajectories, torch.zeros((), dtype=torch.float64, requires_grad=True)
    scores = []
    for i, s in enumerate((taken.timesteps / 1000).tolist()):
        direct = shifted(mu + torch.zeros(number, 1, dtype=torch.float64))
        z = direct(taken.x_t[i].double(), 1 - s)
        # each ẑ depends on μ alike, so the score of one sample is the mean gradient's own
        residual = (taken.x_next[i] - taken.mean[i]).double().flatten()
        (slope,) = torch.autograd.grad(z.mean(), mu, retain_graph=True)
        scores.append(taken.alpha[i] * residual / taken.std[i] ** 2 * slope)
    r = out.image_rewards
    last = 1 - (1 - 1 / STEPS) * gaussian(torch.ones(1).double(), 1 - 1 / STEPS)  # of the last ẑ itself
    terms = r * torch.stack(scores).sum(0) + last
    error = float(terms.std() / math.sqrt(number))
    assert error < 0.1
    assert abs(float(terms.mean() - (above - below))) < 4 * error


@pytest.mark.parametrize("make", [tiny.flux, tiny.sd, tiny.flux_img2img, tiny.sd_img2img])
def test_pipelines(make, monkeypatch):
    """The network's own inputs and times, of every family."""
    toy = tiny.Toy(make)
    seen, forward = [], type(toy.network).forward

    def noting(self, *args, **kwargs):
        x = kwargs.get("hidden_states", args[0] if args else None)
        seen.append((x.clone(), float(torch.as_tensor(kwargs.get("timestep", args[1] if len(args) > 1 else 0)).max())))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(toy.network), "forward", noting)
    out = toy.steer(["a cat", "a dog"], num_transitions=6, record=True, reward_scale=0.0, ess_threshold=0.0)
    taken = out.trajectories
    rows = torch.cat([p * 4 + out.order[p] for p in range(2)])
    told = 1000.0 if make in (tiny.flux, tiny.flux_img2img) else 1.0
    assert len(taken.steps) >= 2
    first_step = 6 - len(seen)
    for i, step in enumerate(taken.steps.tolist()):
        x, timestep = seen[step - first_step]
        assert torch.equal(x[-8:][rows], taken.x_t[i])  # of classifier-free guidance the second half
        assert float(taken.timesteps[i]) == pytest.approx(told * timestep, rel=1e-5)
    torch.testing.assert_close(taken.x_next[:-1], taken.x_t[1:], atol=1e-5, rtol=1e-4)


def test_steps_skip_excursions(flux):
    plain, out = (flux.steer(num_transitions=6, record=True, look_ahead=calls, reward_scale=0.0) for calls in (0, 1))
    assert plain.trajectories.steps.tolist() == [1, 2, 3, 4]
    assert out.trajectories.steps.tolist() == [1, 3, 5, 7]  # these boundaries are followed by a call of an excursion
    assert torch.equal(out.trajectories.timesteps, plain.trajectories.timesteps)
    torch.testing.assert_close(out.trajectories.x_next[:-1], out.trajectories.x_t[1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "native", [EDMDPMSolverMultistepScheduler(), DPMSolverMultistepScheduler(prediction_type="epsilon")]
)
def test_other_schedules(native):
    """Noise levels, units of the data and predictions of another kind: the mean is what the next state lies around."""
    toy = tiny.Toy(tiny.sd)
    toy.pipe.scheduler = native
    taken = toy.steer(num_transitions=6, num_particles=32, record=True, reward_scale=0.0).trajectories
    noise = (taken.x_next.double() - taken.mean.double()) / taken.std.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(noise.square().mean((1, 2, 3, 4)), torch.ones(len(noise)).double(), atol=0.05, rtol=0)
    torch.testing.assert_close(taken.x_next[:-1], taken.x_t[1:], atol=1e-5, rtol=1e-4)


def test_half_precision(flux):
    """What is drawn is drawn around the mean of what the network saw, rounded."""
    flux.pipe.to(torch.bfloat16)
    taken = flux.steer(num_transitions=6, num_particles=32, record=True, reward_scale=0.0).trajectories
    assert taken.x_t.dtype == torch.bfloat16
    noise = (taken.x_next.double() - taken.mean.double()) / taken.std.view(-1, 1, 1, 1)
    torch.testing.assert_close(noise.square().mean((1, 2, 3)), torch.ones(len(noise)).double(), atol=0.05, rtol=0)
    for i in range(len(taken.steps)):  # the same ẑ gives the same density
        z = (taken.mean[i] - float(taken.gamma[i]) * taken.x_t[i].float()) / float(taken.alpha[i])
        torch.testing.assert_close(taken.log_prob_of(i, z), taken.log_prob[i], atol=1e-2, rtol=0)


def test_results_are_the_same_unrecorded(flux):
    plain, noted = (flux.steer(num_transitions=6, reward_scale=1, record=record) for record in (False, True))
    assert plain.trajectories is None
    assert torch.equal(torch.as_tensor(plain.images), torch.as_tensor(noted.images))
    assert "record" not in plain.recipe["call"]
    assert noted.recipe["call"]["record"] is True


def test_a_recorded_result_is_saved(flux, tmp_path):
    out = flux.steer(num_transitions=6, record=True)
    loaded = SteeringResult.load(out.save(tmp_path))
    assert loaded == out
    assert isinstance(loaded.trajectories, Trajectories)
    assert torch.equal(loaded.trajectories.log_prob, out.trajectories.log_prob)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_transitions": 3}, r"3 transition\(s\) of 6 calls.*no Gaussian density.*num_transitions=6.*DPO"),
        ({"num_transitions": 2, "num_inference_steps": 2}, "take 3 network calls or more"),
        ({"num_transitions": 6, "look_ahead": 1, "select": "best_seen"}, "ends of excursions"),
    ],
)
def test_refusals(flux, options, complaint):
    native = flux.pipe.scheduler
    with pytest.raises(ValueError, match=complaint):
        flux.steer(record=True, **options)
    assert flux.pipe.scheduler is native
    assert flux.run() is not None
