"""The state of a transition: what moves with a particle, and where an edit of the network's input goes."""

import torch

from glassflows.flow.sample import run_block
from glassflows.flow.state import InnerState, moved, network_input, start
from oracles import mixture
from schedules import blocks


def test_history_moves_with_its_particle():
    """Rows selected at a boundary go on exactly as their ancestors, given their noise."""
    law, ancestors = mixture(3, 5, 0.3, 0), torch.tensor([3, 0, 0, 4, 1])
    draws = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = blocks(6, 2)
    _, state = run_block(first, law, start(draws[0], first), None)
    expected, _ = run_block(second, law, state, draws[1])
    moved_on, _ = run_block(second, law, state.select(ancestors), draws[1][ancestors])
    torch.testing.assert_close(moved_on, expected[ancestors], rtol=0, atol=1e-12)


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
