"""The state of a transition: what moves with a particle, and where an edit of the network's input goes."""

from dataclasses import replace

import pytest
import torch

from glassflows.flow.noise import RectifiedFlow
from glassflows.flow.sample import run_block
from glassflows.flow.solver import InnerStep
from glassflows.flow.state import InnerState, _roughness, _trust, moved, network_input, start
from oracles import mixture
from schedules import blocks


@pytest.mark.parametrize("guidance", [0.0, 20.0])
def test_history_moves_with_its_particle(guidance):
    """Rows selected at a boundary go on exactly as their ancestors, given their noise; so does the limiter."""
    plain, ancestors = mixture(3, 5, 0.3, 0), torch.tensor([3, 0, 0, 4, 1])

    def law(x, t):
        return plain(x, t) + guidance * (mixture(3, 1, 0.3, 1)(x, t) - plain(x, t))

    draws = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = blocks(6, 2)
    _, state = run_block(first, law, start(draws[0], first), None)
    expected, _ = run_block(second, law, state, draws[1])
    moved_on, _ = run_block(second, law, state.select(ancestors), draws[1][ancestors])
    torch.testing.assert_close(moved_on, expected[ancestors], rtol=0, atol=1e-12)
    forgotten, _ = run_block(second, law, replace(state, roughness=None), draws[1])
    assert torch.equal(forgotten, expected) == (guidance == 0)


def test_the_limiter_remembers_a_rough_chain():
    """The same Δ is trusted in full at first, and less the rougher all were before it."""
    level = RectifiedFlow().level(0.5)
    step = InnerStep(level, 1.0, 1.0, 1.0, 1.0, budget=2.0, rough=0.5)
    square = torch.tensor([0.1, 1.0, 8.0, 8.0], dtype=torch.float64)
    unmoved, trusts, rough = torch.tensor([1.0, 1.0, 1.0, 0.0]), [], None
    for _ in range(3):
        rough = _roughness(step, square, rough, unmoved)
        trusts.append(_trust(step, square, None, rough))
    means = [(4.0**n / 8) ** (1 / (n + 1)) for n in (1, 2, 3)]  # of Δ²/budget = 4, after the eighth of the start
    for trust, mean in zip(trusts, means, strict=True):
        expected = torch.tensor([1, 1, min(1, 0.5 / mean) ** 2 / 4, 1 / 4], dtype=torch.float64)
        torch.testing.assert_close(trust, expected)


def test_an_edit_moves_the_network_input_by_itself():
    """And along the sufficient direction: nothing of it is orthogonal to (cos θ, sin θ)."""
    generator = torch.Generator().manual_seed(0)
    x, e, delta = torch.randn(3, 5, 3, generator=generator, dtype=torch.float64)
    state = InnerState(x, e)
    for step in blocks(12, 3)[1].steps:
        now = network_input(step, state)
        after = moved(step, state, now + delta, now)
        torch.testing.assert_close(network_input(step, after), network_input(step, state) + delta, rtol=0, atol=1e-12)
        base, innovation = after.base - x, after.innovation - e
        torch.testing.assert_close(step.sin * base, step.cos * innovation, rtol=0, atol=1e-12)
