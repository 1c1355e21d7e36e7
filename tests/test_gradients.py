"""Gradients with respect to the network and the initial latents are finite, and those of finite differences."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

import tiny
from glassflows import GLASSScheduler, RectifiedFlow, sample, sample_posterior, sample_transition, value
from glassflows.flow.noise import Trigonometric, VarianceExploding
from glassflows.flow.solver import Solver
from glassflows.flow.state import inner_step, moved, network_input, start
from glassflows.flow.timetable import timetable

FLOW = RectifiedFlow()
OPTIONS = [
    {},
    {"order": 1},
    {"corrector": False},
    {"curved": False},
    {"grid": "condot"},
    {"grid": "condot", "order": 1},
    {"boundary": "discard"},
    {"boundary": "correct"},
    {"trust": math.inf},
    {"trust": 0.05},
    {"trust": 0.0, "reach": 0.0},
    {"rough": 0.01},
    {"last_step": 0.0, "response": 0.0},
]
SPLITS = [(1, 1), (6, 1), (6, 2), (6, 3), (6, 6), (7, 3)]  # calls, transitions


def name(value):
    return ",".join(f"{key}={one}" for key, one in value.items()) or "default" if isinstance(value, dict) else None


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=tiny.seeded(seed), dtype=torch.float64)


def network(weight, schedule=FLOW):
    """A denoiser that bends, of a parameter for each dimension; for which a flow has ẑ = 0 at pure noise."""

    def denoise(x, t):
        level = schedule.level(t)
        scaled = x / math.hypot(level.alpha, level.sigma)
        return torch.sin(weight * scaled + level.alpha / math.hypot(level.alpha, level.sigma)) + 0.2 * weight * scaled

    return denoise


def check_against_differences(function, weight, size=1e-6):
    """Compare the gradient of a scalar function with central differences along random directions and each axis."""
    (gradient,) = torch.autograd.grad(function(weight), weight)
    assert gradient.isfinite().all()
    with torch.no_grad():
        for i in range(len(weight)):
            step = torch.zeros_like(weight)
            step[i] = size
            difference = (function(weight + step) - function(weight - step)) / (2 * size)
            assert gradient[i].item() == pytest.approx(difference.item(), rel=2e-5, abs=1e-7)
    assert gradient.abs().max() > 1e-3  # it says something


def weights():
    return torch.tensor([0.4, 0.9, -0.6], dtype=torch.float64, requires_grad=True)


def euler_chain(w, x, noise):
    """Three Euler steps of the ODE from noise to t = ½, then three in a DDPM transition to data, for D = w t x/v(t).

    An independent computation: complex numbers in, complex numbers out, floats of the equations alone.
    """

    def denoised(x, t):
        return w * t * x / (t**2 + (1 - t) ** 2)

    times = [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6]
    for t, t_next in pairwise(times[:4]):
        # de/dλ = ẑ on λ = t/(1 − t) with x = (1 − t) e
        x = (1 - t_next) * (x / (1 - t) + (t_next / (1 - t_next) - t / (1 - t)) * denoised(x, t))
    base, e = x / 0.5, noise
    for t, t_next in pairwise([*times[3:], None]):
        snr = (t / (1 - t)) ** 2
        lam = math.sqrt(max(snr - 1, 0.0))
        z = denoised((1 - t) * (base + lam * e) / math.sqrt(snr), t)
        if t_next is None:
            return z
        e = e + (math.sqrt((t_next / (1 - t_next)) ** 2 - 1) - lam) * z
    raise AssertionError


def test_the_gradient_of_a_euler_chain_is_its_complex_derivative():
    x = torch.randn(5, 3, generator=tiny.seeded())
    noise = torch.randn(5, 3, generator=tiny.seeded(1))
    w = torch.tensor(1.0, requires_grad=True)
    z = sample(
        lambda x, t: w * t * x / (t**2 + (1 - t) ** 2),
        x,
        num_steps=6,
        num_transitions=2,
        solver_order=1,
        noises=[noise],
    )
    (gradient,) = torch.autograd.grad(z.square().mean(), w)
    small = 1e-20
    exact = euler_chain(1 + small * 1j, x.double().numpy(), noise.double().numpy())
    np.testing.assert_allclose(z.detach(), exact.real, rtol=1e-5, atol=1e-6)
    assert gradient.item() == pytest.approx((exact**2).imag.mean() / small, rel=1e-5)
    assert gradient.item() == pytest.approx(2.5601, abs=5e-5)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_gradients_of_a_chain(options, split):
    num_steps, num_transitions = split
    x, noises = draws(4, 3), list(draws(num_transitions - 1, 4, 3, seed=1))

    def function(weight):
        z = sample(
            network(weight),
            x,
            num_steps=num_steps,
            num_transitions=num_transitions,
            noises=noises,
            solver=Solver(**options),
        )
        return z.square().mean()

    check_against_differences(function, weights())


@pytest.mark.parametrize("correlation", ["ddpm", 0.3, 0.0, 1.0, -1.0], ids=str)
@pytest.mark.parametrize("schedule", [FLOW, Trigonometric(), VarianceExploding(10.0, 1.0)], ids=["flow", "vp", "ve"])
@pytest.mark.parametrize("order", [1, 2])
def test_gradients_of_a_transition(order, schedule, correlation):
    x, noise = draws(4, 3), draws(4, 3, seed=1)

    def function(weight):
        x_next = sample_transition(
            network(weight, schedule),
            x,
            0.3,
            0.8,
            num_steps=5,
            schedule=schedule,
            correlation=correlation,
            noise=noise,
            solver_order=order,
        )
        return x_next.square().mean()

    check_against_differences(function, weights())


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_gradients_of_a_posterior_sample(options, num_steps):
    x, noise = draws(4, 3), draws(4, 3, seed=1)

    def function(weight):
        z = sample_posterior(network(weight), x, 0.4, num_steps=num_steps, noise=noise, solver=Solver(**options))
        return z.square().mean()

    check_against_differences(function, weights())


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_gradients_of_a_value(options, num_steps):
    x = draws(4, 3)

    def function(weight):
        return value(
            network(weight),
            x,
            0.4,
            lambda z: z.square().sum(-1) + weight[0] * z[:, 1],
            num_samples=3,
            num_steps=num_steps,
            solver=Solver(**options),
            generator=tiny.seeded(2),
        ).sum()

    check_against_differences(function, weights())


@pytest.mark.parametrize("split", [(1, 1), (5, 1), (5, 2), (4, 4)], ids=str)
@pytest.mark.parametrize("options", [{}, {"order": 1}, {"corrector": False}, {"trust": 0.05}], ids=name)
def test_derivatives_of_every_output_by_every_input(options, split):
    """By network, initial state and noise; twice, as implicit gradients and Hessians need."""
    num_steps, num_transitions = split

    def chain(weight, x, *noises):
        return sample(
            network(weight),
            x,
            num_steps=num_steps,
            num_transitions=num_transitions,
            noises=noises,
            solver=Solver(**options),
        )

    inputs = [weights(), *(one.requires_grad_() for one in draws(num_transitions, 2, 3))]
    assert gradcheck(chain, inputs)


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_a_constant_denoiser_has_the_gradient_one(split, options):
    """Nothing changes between calls, so nothing may be divided by: z = w from whatever noise, and dz/dw = 1."""
    num_steps, num_transitions = split
    w = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64, requires_grad=True)
    z = sample(
        lambda x, t: w.expand_as(x),
        draws(4, 3),
        num_steps=num_steps,
        num_transitions=num_transitions,
        noises=list(draws(num_transitions - 1, 4, 3, seed=1)),
        solver=Solver(**options),
    )
    (gradient,) = torch.autograd.grad(z.sum(), w)
    torch.testing.assert_close(gradient, torch.full_like(w, 4.0), rtol=0, atol=1e-12)


def test_a_prediction_that_stands_still_for_a_while_has_a_gradient():
    """Two equal ẑ, then another: the direction of no change is no direction, and its gradient is 0."""
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = draws(4, 3)

    def function(weight):
        return sample(
            lambda x, t: weight * (torch.sin(x) if t > 0.4 else torch.ones_like(x)),
            x,
            num_steps=6,
            num_transitions=1,
        ).square().mean()  # fmt: skip

    (gradient,) = torch.autograd.grad(function(w), w)
    with torch.no_grad():
        difference = (function(w + 1e-6) - function(w - 1e-6)) / 2e-6
    assert gradient.item() == pytest.approx(difference.item(), rel=1e-5)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_gradients_go_through_edits_of_rows(at):
    """Rows that a host moves forget their history: it has weight 0 there, and its gradient is 0, not NaN."""
    blocks = timetable(
        [FLOW.level(float(t)) for t in np.linspace(0, 1, 7)], 2, schedule=FLOW, correlation="ddpm", solver=Solver()
    )
    x_init, noise, delta = draws(3, 4, 3)
    rows = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)[:, None]

    def function(weight):
        denoise, state = network(weight), start(x_init, blocks[0])
        x, calls = network_input(blocks[0].steps[0], state), 0
        for k, block in enumerate(blocks):
            for i, step in enumerate(block.steps):
                if calls == at:
                    edited = x + rows * weight * delta
                    x, state = edited, moved(step, state, edited, x)
                z = denoise(x, step.level.t)
                x, state = inner_step(block, i, state, z, noise if k and not i else None)
                calls += 1
        return x.square().mean()

    check_against_differences(function, weights())


# ---- the scheduler -------------------------------------------------------------------------------


def run(weight, x, num_steps, edit=lambda i, x: x, begin=0, **options):
    """Step a scheduler through a run in float32, with gradients; sigmas even, noise of seed 1."""
    scheduler = GLASSScheduler(**options)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    scheduler.set_begin_index(begin)
    scheduler.set_generator(tiny.seeded(1))
    for i, t in enumerate(scheduler.timesteps[begin:], begin):
        x = edit(i, x)
        time = 1 - i / num_steps
        velocity = (x - network(weight)(x, 1 - time)) / time
        x = scheduler.step(velocity, t, x).prev_sample
    return x


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("options", [{}, {"solver_order": 1}, {"corrector": False}], ids=name)
def test_gradients_of_the_scheduler_are_those_of_sample(options, split):
    num_steps, num_transitions = split
    x = torch.randn(4, 3, generator=tiny.seeded())
    generator = tiny.seeded(1)
    noises = [torch.randn(4, 3, generator=generator).double() for _ in range(num_transitions - 1)]
    double, single = weights(), weights().detach().float().requires_grad_()
    z = sample(
        network(double), x.double(), num_steps=num_steps, num_transitions=num_transitions, noises=noises, **options
    )
    latents = run(single, x.requires_grad_(), num_steps, num_transitions=num_transitions, **options)
    torch.testing.assert_close(latents, z.float(), rtol=1e-4, atol=1e-4)
    (expected,) = torch.autograd.grad(z.square().mean(), double)
    (gradient,) = torch.autograd.grad(latents.square().mean(), single)
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("same", [True, False], ids=["same values", "other values"])
@pytest.mark.parametrize("order", [1, 2])
def test_latents_detached_within_an_ode_are_where_the_gradient_begins(order, same):
    """As loss guidance does: the run depends on the leaf that it is given, and on nothing before it."""
    weight, leaves = weights().detach().float().requires_grad_(), []

    def detach(i, x):
        if i != 2:
            return x
        leaves.append((x if same else x + 0.1).detach().requires_grad_())
        return leaves[-1]

    options = {"num_transitions": 1, "solver_order": order}
    latents = run(weight, torch.randn(4, 3, generator=tiny.seeded()), 5, detach, **options)
    (gradient,) = torch.autograd.grad(latents.square().mean(), leaves)
    if order == 1:  # a run from there is the rest of this one
        again = leaves[0].detach().clone().requires_grad_()
        rest = run(weight, again, 5, begin=2, **options)
        torch.testing.assert_close(rest, latents, rtol=0, atol=1e-5)
        (expected,) = torch.autograd.grad(rest.square().mean(), again)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert gradient.isfinite().all()
    assert gradient.abs().min() > 0


def test_a_run_from_latents_that_require_a_gradient_warns_of_nothing():
    """So many that the scale of the initial noise is looked at."""
    x = torch.randn(64, 3, generator=tiny.seeded()).requires_grad_()
    few = x[:4].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(run(weights().detach().float(), x, 6, num_transitions=1).sum(), x)
    (expected,) = torch.autograd.grad(run(weights().detach().float(), few, 6, num_transitions=1).sum(), few)
    torch.testing.assert_close(gradient[:4], expected)


@pytest.mark.parametrize(
    ("outside", "inside"),
    [(torch.enable_grad, torch.no_grad), (torch.no_grad, torch.inference_mode)],
    ids=["gradients and none", "none and inference"],
)
def test_parts_of_a_run_may_do_without_gradients(outside, inside):
    weight = weights().detach().float().requires_grad_()
    x = torch.randn(4, 3, generator=tiny.seeded())
    whole = run(weight, x, 6, num_transitions=2)
    scheduler = GLASSScheduler(num_transitions=2)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6))
    scheduler.set_generator(tiny.seeded(1))
    latents = x
    for i, t in enumerate(scheduler.timesteps):
        with inside() if i in (1, 2, 4) else outside():
            velocity = (latents - network(weight)(latents, i / 6)) / (1 - i / 6)
            latents = scheduler.step(velocity, t, latents).prev_sample.clone()
    torch.testing.assert_close(latents, whole, rtol=0, atol=1e-6)
