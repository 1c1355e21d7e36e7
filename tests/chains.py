"""A flow scheduler driven through the exact denoiser of a law, as the loop of a pipeline drives it."""

import numpy as np
import torch

import tiny
from glassflows import GLASSScheduler
from oracles import reference

OPTIONS = [
    {"num_transitions": 4},
    {"num_transitions": 4, "solver_order": 1},
    {"num_transitions": 4, "corrector": False},
    {"num_transitions": 4, "correlation": 0.1},
    {"num_transitions": 3, "inner_grid": "condot"},
    {"num_transitions": 20},
]


def drive(scheduler, law, x, *, begin=0, edit=lambda i, x: x):
    """Return the network's input at each call from `begin` on, and the last sample.

    `law(x, t)` is E[z | x_t]; `edit(i, x)` acts before call i, as a callback would.
    """
    seen = []
    for i, t in enumerate(scheduler.timesteps[begin:], begin):
        x = edit(i, x)
        seen.append(x)
        level = 1 - float(t) / 1000
        velocity = (x.double() - law(x.double(), level)) / (1 - level)
        x = scheduler.step(velocity.float(), t, x).prev_sample
    return [*seen, x]


def glass(steps, begin=0, *, first=1.0, **options):
    """Return a scheduler of flows at the start of a run of so many equal steps, with its noise seeded."""
    scheduler = GLASSScheduler(**options)
    scheduler.set_generator(tiny.seeded(1))
    scheduler.set_timesteps(steps, sigmas=np.linspace(first, first / steps, steps))
    scheduler.set_begin_index(begin)
    return scheduler


def chain(edit=lambda i, x: x, *, begin=0, x=None, **options):
    """Run twelve calls on the reference mixture."""
    x = torch.randn(5, 3, generator=tiny.seeded()) if x is None else x
    return drive(glass(12, begin, **options), reference()[0], x, begin=begin, edit=edit)
