"""What a scheduler tells of a run: boundaries, network calls, and the denoised predictions there."""

import copy

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler

import tiny
from glassflows import GLASSScheduler
from glassflows.scheduler import TransitionHook


def glass():
    return tiny.Toy(tiny.flux).glass()


def test_denoised_predictions_of_every_call():
    """They are E[z | x_t] of the latents that a callback sees: for a flow x_t − σ v."""
    toy, told, inputs, outputs = glass(), [], [], []
    toy.pipe.scheduler.on_denoised = lambda call, z: told.append((call, z))

    def noting(network, args, kwargs, output):
        inputs.append(kwargs["hidden_states"].clone())
        outputs.append(output[0].clone())

    toy.network.register_forward_hook(noting, with_kwargs=True)
    plain = glass().run()
    assert np.array_equal(toy.run(), plain)
    assert [call.index for call, _ in told] == [*range(6)]
    assert {call.total for call, _ in told} == {6}
    assert [call.boundary and call.boundary.index for call, _ in told] == [0, None, 1, None, 2, None]
    sigmas = toy.pipe.scheduler.sigmas.tolist()
    for (call, z), x, v, sigma in zip(told, inputs, outputs, sigmas, strict=False):
        assert call.level.sigma == pytest.approx(sigma, abs=1e-6)
        torch.testing.assert_close(z, x - sigma * v, rtol=0, atol=1e-5)


def test_boundaries():
    toy, seen, latents = glass(), [], []
    toy.pipe.scheduler.on_boundary = lambda at, x_t, z: seen.append((at, x_t.clone(), z))

    def noting(pipe, i, t, tensors):
        latents.append(tensors["latents"].clone())
        return tensors

    toy.run(callback_on_step_end=noting)
    assert [(at.index, at.total) for at, _, _ in seen] == [(0, 3), (1, 3), (2, 3)]
    assert torch.equal(seen[1][1], latents[1])
    assert torch.equal(seen[2][1], latents[3])
    assert all(z.shape == x_t.shape and z.dtype == x_t.dtype for _, x_t, z in seen)


def test_what_observers_get_is_theirs():
    """Writing into a prediction changes nothing; nor does what an observer returns."""
    toy = glass()
    toy.pipe.scheduler.on_denoised = lambda call, z: z.zero_()
    toy.pipe.scheduler.on_boundary = lambda at, x_t, z: z.zero_()
    assert np.array_equal(toy.run(), glass().run())


def test_predictions_are_in_the_hosts_units():
    """Of EDM the data have a standard deviation of .5, which the host's clean samples keep."""
    scheduler = GLASSScheduler.from_scheduler(EDMDPMSolverMultistepScheduler())
    told = []
    scheduler.on_denoised = lambda call, z: told.append(z)
    scheduler.set_timesteps(4)
    x, v = torch.randn(2, 5, 3, generator=tiny.seeded())
    out = scheduler.step(v, scheduler.timesteps[0], x)
    assert torch.equal(told[0], out.pred_original_sample)


def test_observers_stay_with_a_scheduler_that_is_made_of_another():
    """Also under steering; a copy, as LTX-2 makes of its own for the sound, tells nobody."""
    toy, told = glass(), []
    mine = toy.pipe.scheduler.on_denoised = lambda call, z: told.append(z)
    assert GLASSScheduler.from_scheduler(toy.pipe.scheduler).on_denoised is mine
    assert copy.deepcopy(toy.pipe.scheduler).on_denoised is None
    toy.steer(num_transitions=None)
    assert [len(z) for z in told] == [4] * 6
    assert toy.pipe.scheduler.on_denoised is mine


def test_a_hook_that_raises_ends_the_run():
    class Mine(Exception):
        pass

    class Hook(TransitionHook):
        def at_boundary(self, at, x_t, z):
            raise Mine

    toy = glass()
    toy.pipe.scheduler.hook = Hook()
    with pytest.raises(Mine):
        toy.run()
    toy.pipe.scheduler.hook = None
    assert np.array_equal(toy.run(), glass().run())


def test_a_hook_cannot_run_its_own_scheduler():
    toy = glass()
    toy.pipe.scheduler.on_boundary = lambda at, x_t, z: toy.run()
    with pytest.raises(RuntimeError, match="called from a hook of the run under way"):
        toy.run()
    toy.pipe.scheduler.on_boundary = None
    assert np.array_equal(toy.run(), glass().run())


def test_hooks_hear_of_every_call():
    """What they are shown after a call is what the pipeline is handed."""
    heard, latents = [], []

    class Hook(TransitionHook):
        def after_call(self, call, x_next):
            heard.append((call.index, x_next.clone()))

    def noting(pipe, i, t, tensors):
        latents.append(tensors["latents"].clone())
        return tensors

    toy = glass()
    toy.pipe.scheduler.hook = Hook()
    toy.run(callback_on_step_end=noting)
    assert [index for index, _ in heard] == [*range(6)]
    assert all(torch.equal(x, y) for (_, x), y in zip(heard, latents, strict=True))


def test_a_copy_made_in_an_observer_runs():
    """As a look-ahead would: it is no part of the run it was made in."""
    toy, copies = glass(), []
    toy.pipe.scheduler.on_boundary = lambda at, x_t, z: copies.append(copy.deepcopy(toy.pipe.scheduler))
    toy.run()
    copies[0].set_timesteps(4, mu=0.8)
    assert len(copies[0].timesteps) == 4
