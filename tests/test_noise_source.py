"""Where the scheduler's noise comes from: generators given at the draw, given before, or one for each row."""

import numpy as np
import pytest
import torch

import tiny
from glassflows import GLASSScheduler
from zoo.survey import cases

GRID = [1.0, 0.75, 0.5, 0.25]


def go(scheduler, generator=None):
    """Return the last sample of four calls."""
    x, v = torch.randn(2, 5, 3, generator=tiny.seeded())
    scheduler.set_timesteps(4, sigmas=GRID)
    for t in scheduler.timesteps:
        x = scheduler.step(0.3 * x + v, t, x, generator=generator).prev_sample
    return x


# ---- in pipelines ----------------------------------------------------------------------------------------------------


def test_the_pipelines_generator_reproduces(toy):
    one, again, other = (toy.glass().run(seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_given_latents_reproduce(toy):
    """`latents=` without any generator: the noise in between follows from them, where no generator reaches `step`."""
    toy.glass()
    latents = toy.latents(2)
    both, again = (
        toy.run(latents=given, generator=None, num_images_per_prompt=2) for given in (latents, latents.clone())
    )
    assert np.array_equal(both, again)
    alone = toy.run(latents=latents[1:], generator=None)
    np.testing.assert_allclose(alone[0], both[1], atol=2e-5)
    assert np.abs(both[0] - both[1]).max() > 1e-3


def test_a_batch_equals_its_singles(toy):
    batch = toy.glass().run(num_images_per_prompt=3, generator=[tiny.seeded(s) for s in range(3)])
    for seed in range(3):
        np.testing.assert_allclose(toy.run(seed=seed)[0], batch[seed], atol=2e-5)


def test_equal_latents_part_ways_at_the_first_boundary(flux):
    seen = []
    flux.glass(2).run(
        num_images_per_prompt=2, generator=[tiny.seeded(0), tiny.seeded(0)],
        callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(kwargs["latents"]) or {},
    )  # fmt: skip
    assert [torch.equal(*latents) for latents in seen] == [True, True, True, False, False, False]


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_sources_in_order():
    scheduler = GLASSScheduler(num_transitions=2)

    def last(own=None, given=None):
        scheduler.set_generator(own)
        return go(scheduler, given)

    assert torch.equal(last(), last())
    assert torch.equal(last(own=tiny.seeded(1)), last(given=tiny.seeded(1)))
    assert torch.equal(last(own=tiny.seeded(2), given=tiny.seeded(1)), last(given=tiny.seeded(1)))
    assert not torch.equal(last(), last(own=tiny.seeded(1)))
    assert torch.equal(last(given=[tiny.seeded(s) for s in range(5)]), last(own=[tiny.seeded(s) for s in range(5)]))


def test_a_list_of_generators_has_one_per_row():
    expected = "^generator: expected one or a list of one per row, 5, got a list of 2: pass a single generator$"
    with pytest.raises(ValueError, match=expected):
        go(GLASSScheduler(num_transitions=2), [tiny.seeded(0), tiny.seeded(1)])


def test_a_scheduler_made_of_another_draws_from_its_generator():
    """Its very own, which goes on where the other left it."""

    def with_generator(generator):
        scheduler = GLASSScheduler(num_transitions=2)
        scheduler.set_generator(generator)
        return scheduler

    expected, generator = with_generator(tiny.seeded(1)), tiny.seeded(1)
    first, second = go(expected), go(expected)
    assert not torch.equal(first, second)
    given = with_generator(generator)
    assert torch.equal(go(GLASSScheduler.from_scheduler(given)), first)
    assert torch.equal(go(GLASSScheduler.from_scheduler(given)), second)
    assert not torch.equal(first, go(GLASSScheduler.from_scheduler(with_generator(None))))


def test_a_steered_call_draws_from_the_schedulers_generator(flux):
    """As a plain one does; FLUX hands none to `step`."""

    def images(draw, seed):
        flux.glass().pipe.scheduler.set_generator(tiny.seeded(seed))
        return draw()

    def steered():
        out = flux.steer(reward_scale=0, num_transitions=None)
        return out.images[out.order[0].argsort()]

    one, other = (images(steered, seed) for seed in (5, 6))
    assert np.array_equal(one, images(lambda: flux.run(num_images_per_prompt=4), 5))
    assert np.abs(one - other).max() > 1e-3


# ---- initial noise ---------------------------------------------------------------------------------------------------


@tiny.DIFFUSERS_42
def test_initial_noise_of_another_scale_is_noticed():
    """PRX-Pixel starts from twice the noise, which only its pipeline knows."""
    case = cases()["PRXPixelPipeline"]
    toy = tiny.Toy(case.build, case.call()).glass()
    expected = r"^step: expected initial noise of standard deviation 1, got 2\.\d+: scale latents that are passed, or"
    for generator in (None, tiny.seeded(1)):
        toy.pipe.scheduler.set_generator(generator)
        with pytest.raises(ValueError, match=expected):
            toy.run(num_inference_steps=3)
