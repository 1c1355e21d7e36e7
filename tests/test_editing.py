"""Latents that the host changes within a run: by callbacks, in place, and by inpainting at every step."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import tiny
from chains import chain
from glassflows import GLASSScheduler
from zoo.survey import cases

# ---- edits -----------------------------------------------------------------------------------------------------------


def test_untouched_latents_are_untouched():
    plain, copied = chain(num_transitions=3), chain(lambda i, x: x.clone(), num_transitions=3)
    assert all(torch.equal(a, b) for a, b in zip(plain, copied, strict=True))


@pytest.mark.parametrize("i", [4, 8])
def test_edits_at_a_boundary_replace_the_state(i):
    """Calls 4 and 8 begin transitions: given other latents there, a run goes on from them, whatever it was before."""
    given = torch.randn(5, 3, generator=tiny.seeded(7))

    def edited(seed):
        x = torch.randn(5, 3, generator=tiny.seeded(seed))
        return chain(lambda j, x: given if j == i else x, x=x, num_transitions=3)[-1]

    torch.testing.assert_close(edited(1), edited(2), rtol=0, atol=1e-5)


def test_edits_of_a_row_leave_the_others_their_history():
    def edit(j, x):
        return torch.cat([x[:2] + 0.3, x[2:]]) if j == 4 else x

    plain, edited = chain(num_transitions=3)[-1], chain(edit, num_transitions=3)[-1]
    assert torch.equal(plain[2:], edited[2:])
    assert (plain[:2] - edited[:2]).abs().min() > 1e-4


def test_edits_within_an_ode_replace_its_state():
    """One transition is the ODE: edited at call i, it goes on as the ODE begun there."""
    start = torch.randn(5, 3, generator=tiny.seeded(7))
    pasts = [
        chain(lambda i, x: start if i == 5 else x, num_transitions=1, x=torch.randn(5, 3, generator=tiny.seeded(seed)))
        for seed in (1, 2)
    ]
    torch.testing.assert_close(pasts[0][-1], pasts[1][-1], rtol=0, atol=1e-5)
    edited = chain(lambda i, x: start if i == 5 else x, num_transitions=1, solver_order=1)
    torch.testing.assert_close(
        edited[-1], chain(begin=5, x=start, num_transitions=1, solver_order=1)[-1], rtol=0, atol=1e-5
    )


def test_edits_within_a_transition_move_the_result():
    plain, edited = (chain(edit, num_transitions=3) for edit in (lambda i, x: x, lambda i, x: x + 0.1 * (i == 10)))
    assert (edited[-1] - plain[-1]).abs().min() > 1e-5


def test_in_place_writes_do_not_reach_the_state():
    scheduler = GLASSScheduler(num_transitions=2)
    other = GLASSScheduler(num_transitions=2)
    x, v = torch.randn(2, 5, 3, generator=tiny.seeded())
    a, b = x.clone(), x.clone()
    for one in (scheduler, other):
        one.set_timesteps(4, sigmas=[1.0, 0.75, 0.5, 0.25])
    for t in scheduler.timesteps:
        a = scheduler.step(v, t, a).prev_sample
        buffer = b  # as Kandinsky 5 does: latents[...] = step(...)
        buffer[...] = other.step(v, t, buffer).prev_sample
        b = buffer
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


# ---- callbacks -------------------------------------------------------------------------------------------------------


def test_callbacks_change_latents(toy):
    """Set to zero after the last step they decode to what zero decodes to; changed on the way they change the image."""
    toy.glass()

    def zero(at):
        def callback(pipe, i, t, kwargs):
            return {"latents": torch.zeros_like(kwargs["latents"])} if i == at else {}

        return callback

    assert toy.run(callback_on_step_end=zero(5), output_type="latent").abs().max() == 0
    plain, changed = toy.run(), toy.run(callback_on_step_end=zero(2))
    assert np.abs(plain - changed).max() > 1e-3
    assert np.array_equal(plain, toy.run())


# ---- inpainting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_transitions", range(1, 7))
def test_inpainting_keeps_what_the_native_scheduler_keeps(inpaint, num_transitions):
    """One transition is the native sampler; with more the painted half differs and the kept one does not."""
    native = inpaint.run(output_type="latent")
    ours = inpaint.glass(num_transitions, solver_order=1).run(output_type="latent")
    if inpaint.make is tiny.flux_inpaint:  # packed 2 × 2
        native, ours = (latents.view(1, 4, 6, 16).permute(0, 3, 1, 2) for latents in (native, ours))
    half = ours.shape[-1] // 2
    torch.testing.assert_close(ours[..., half:], native[..., half:], rtol=0, atol=1e-5)
    if num_transitions == 1:
        torch.testing.assert_close(ours, native, rtol=0, atol=1e-4)
    else:
        assert (ours - native)[..., :half].abs().max() > 0.1


BLENDING = ["ChromaInpaintPipeline", "FluxControlNetInpaintPipeline", "QwenImageInpaintPipeline",
            "StableDiffusion3InpaintPipeline", "StableDiffusionXLInpaintPipeline", "ZImageInpaintPipeline"]  # fmt: skip


@tiny.DIFFUSERS_42
@pytest.mark.slow
@pytest.mark.parametrize("name", BLENDING)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_family_keeps_the_kept_half_of_its_latents(name):
    """Inside the loop, at every step: what the network is shown of the kept half is the native scheduler's."""
    case = cases()[name]
    pipe = case.build()
    native = pipe.scheduler
    if "Euler" in type(native).__name__ and "Flow" not in type(native).__name__:  # its latents are z + σ ε
        native = DDIMScheduler.from_config(native.config)
    seen = []
    for scheduler in (native, GLASSScheduler.from_scheduler(native, num_transitions=4)):
        latents = []

        def note(pipe, i, t, kwargs, latents=latents):
            latents.append(kwargs["latents"].clone())
            return {}

        pipe.scheduler = scheduler
        options = {"num_inference_steps": 8, "generator": tiny.seeded(), "output_type": "latent"}
        pipe(**(options | case.call() | {"callback_on_step_end": note}))
        seen.append(torch.stack(latents))
    same = (seen[0] - seen[1]).abs().amax(0) < 1e-5  # at every step
    assert 0.2 < same.float().mean() < 0.8
