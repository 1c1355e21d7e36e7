"""The solver of the inner ODE: its orders, its limiter, and what it does exactly."""

import math

import numpy as np
import pytest
import torch

from glassflows import sample
from glassflows.flow.sample import run_chain
from glassflows.flow.solver import Solver
from oracles import Gaussian, mixture, reference
from schedules import blocks


def slopes(law, *settings, num_transitions=6):
    """Return of each setting the order of convergence, and the errors it is the slope of.

    They are the errors of chains on the native grid against a converged run.
    """
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(num_transitions, 300, law.means.shape[1], generator=generator, dtype=torch.float64)

    def run(num_steps, **options):
        return sample(
            law, draws[0], num_steps=num_steps, num_transitions=num_transitions, noises=list(draws[1:]), **options
        )

    exact, calls, found = run(4800), [48, 96, 192, 384], []
    for options in settings:
        errors = [(run(n, **options) - exact).norm(dim=-1).median().item() for n in calls]
        found.append((-np.polyfit(np.log(calls), np.log(errors), 1)[0], errors))
    return found


LAWS = {"reference": reference()[0], "2-D": mixture(2, 5, 0.3, 1), "16-D": mixture(16, 10, 0.3, 0)}


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_second_order(law):
    (order, errors), (_, euler) = slopes(law, {}, {"solver_order": 1})
    assert order >= 1.8
    assert errors[0] < euler[-1]  # 48 calls beat 384 of Euler


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("num_transitions", [2, 6, 12])
def test_24_calls_beat_72_of_the_published_scheme(law, num_transitions):
    draws = torch.randn(
        num_transitions, 300, law.means.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    exact, ours, published = (
        chain(law, draws, calls, num_transitions, **options)
        for calls, options in ((2400, {}), (24, {}), (72, {"order": 1, "grid": "condot"}))
    )
    errors = [(one - exact).norm(dim=-1).median() for one in (ours, published)]
    assert errors[0] < errors[1] / 2


@pytest.mark.slow
def test_euler_is_of_first_order():
    """Steps of λ are longest where a transition begins, ~ √P: a logarithm on the way to slope 1."""
    ((order, _),) = slopes(mixture(2, 5, 0.3, 1), {"solver_order": 1}, num_transitions=2)
    assert 0.9 <= order < 1.2


@pytest.mark.slow
def test_uncorrected_predictor_is_of_first_order_at_fixed_number_of_transitions():
    ((order, _),) = slopes(mixture(2, 5, 0.3, 1), {"corrector": False})
    assert 0.8 < order < 1.4


def chain(law, draws, num_steps, num_transitions, **options):
    """`sample` with any option of the solver."""
    return run_chain(blocks(num_steps, num_transitions, **options), law, draws[0], lambda k: draws[k + 1])


def guided(law, scale, conditional):
    return lambda x, t: law(x, t) + scale * (conditional(x, t) - law(x, t))


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [15, 20, 25, 30])
def test_strong_guidance_does_not_blow_up(num_steps):
    """Guidance 7.5 towards a narrow law: without its limiter order 2 is far off where Euler is not."""
    broad, narrow = (
        Gaussian(torch.zeros(16).double(), torch.eye(16).double()),
        torch.linspace(0.05, 1, 16).double() ** 2,
    )
    law = guided(broad, 7.5, Gaussian(torch.zeros(16).double(), narrow.diag()))
    draws = torch.randn(5, 100, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = chain(law, draws, 1200, 5)

    def error(**options):
        return (chain(law, draws, num_steps, 5, **options) - exact).norm(dim=-1).median().item()

    assert error() < 4 * error(order=1)
    if num_steps < 25:  # what the limiter remembers of the chain, and the limiter itself
        assert error(rough=math.inf) > 1.5 * error()
        assert error(trust=math.inf) > 4 * error()


def test_the_limiter_leaves_plain_denoisers_alone():
    """It is off where nothing is guided and steps are not coarse."""
    law = mixture(16, 10, 0.3, 0)
    draws = torch.randn(6, 100, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    limited, free = (chain(law, draws, 96, 6, trust=trust) for trust in (4.0, math.inf))
    assert (limited - free).norm(dim=-1).median() < 1e-6
    limited, forgetful = (chain(law, draws, 12, 6, rough=rough) for rough in (0.5, math.inf))
    assert (limited - forgetful).norm(dim=-1).median() < 1e-6  # data of several modes are rough now and then


def test_rows_do_not_see_each_other():
    law = mixture(3, 5, 0.3, 0)
    draws = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = chain(law, draws, 9, 3)
    alone = chain(law, draws[:, 2:3], 9, 3)
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-12)


def test_a_constant_denoiser_is_sampled_exactly():
    """Nothing to extrapolate, nothing to divide by: every scheme ends at the constant."""
    draws = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    constant = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(chain(lambda x, t: constant, draws, 9, 3), constant, rtol=0, atol=1e-12)


def test_data_are_reached_by_the_last_denoised_prediction():
    step = blocks(5, 5)[-1].steps[-1]
    assert (step.keep, step.euler, step.predict) == (0.0, 1.0, 0.0)
    assert math.isinf(blocks(5, 5)[-1].transition.lam_end)


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"^solver_order: expected 1 \(Euler\) or 2 \(two-step\), got 3$"):
        Solver(3)
    with pytest.raises(ValueError, match='^inner_grid: expected "time" or "condot", got \'uniform\'$'):
        Solver(grid="uniform")
    with pytest.raises(ValueError, match=r"^rough: expected a number above 0, got 0\.0$"):
        Solver(rough=0.0)


def test_shows_the_options_that_are_not_as_usual():
    assert repr(Solver()) == "Solver()"
    assert repr(Solver(order=1, boundary="discard")) == "Solver(order=1, boundary='discard')"
