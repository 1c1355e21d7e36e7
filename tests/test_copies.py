"""Copies of a scheduler, as LTX-2 makes one for its sound: streams of noise of their own, rows of their original."""

import copy

import pytest
import torch

import tiny
from glassflows import GLASSScheduler
from zoo import ltx2


def test_deep_copies_draw_independent_noise():
    scheduler = GLASSScheduler(num_transitions=2)
    scheduler.set_generator(tiny.seeded(1))
    x = torch.randn(5, 3, generator=tiny.seeded())

    def last(scheduler):
        latents = x
        for t in scheduler.timesteps:
            latents = scheduler.step(0.3 * latents, t, latents).prev_sample
        return latents

    draws = []
    for generator in (None, tiny.seeded(1), None, tiny.seeded(1)):
        scheduler.set_generator(generator)
        scheduler.set_timesteps(4, sigmas=[1.0, 0.75, 0.5, 0.25])
        copies = [copy.deepcopy(scheduler), copy.deepcopy(scheduler)]
        draws.append([last(one) for one in (scheduler, *copies)])
    for one in draws[:2]:
        assert not any(torch.equal(one[i], one[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    for one, again in ((0, 2), (1, 3)):
        assert all(torch.equal(a, b) for a, b in zip(draws[one], draws[again], strict=True))


@tiny.DIFFUSERS_42
def test_a_copy_of_the_scheduler_follows_its_resampling(monkeypatch):
    """LTX-2 samples sound beside the video with a copy: after resampling both go on from the same particle."""
    seen = tiny.predictions(monkeypatch)
    tiny.Toy(lambda: ltx2.build("LTX2Pipeline"), ltx2.call()).steer(num_inference_steps=4, **tiny.SECOND_TAKES_ALL)
    leader = seen[0][0]
    video = [rows for scheduler, rows in seen if scheduler is leader]
    sound = [rows for scheduler, rows in seen if scheduler is not leader]
    assert len(video) == len(sound) == 4
    for stream in (video, sound):
        assert not torch.equal(stream[0][0], stream[0][1])
        assert torch.equal(stream[2][0], stream[2][1])  # the second transition begins: both slots hold one particle
        assert not torch.equal(stream[3][0], stream[3][1])  # and part ways


@tiny.DIFFUSERS_42
def test_a_copy_that_steps_first_is_refused():
    from diffusers import LTX2Pipeline

    class SoundFirst(LTX2Pipeline):
        """Steps its copy before the scheduler it was copied from."""

        def prepare_audio_latents(self, *args, **kwargs):
            scheduler = copy.deepcopy(self.scheduler)
            scheduler.set_timesteps(4, mu=1.0)
            scheduler.step(torch.zeros(2, 3), scheduler.timesteps[0], torch.ones(2, 3))

    toy = tiny.Toy(lambda: SoundFirst(**ltx2.build("LTX2Pipeline").components), ltx2.call())
    with pytest.raises(ValueError, match="^SoundFirst cannot be steered: a copy of its scheduler steps first$"):
        toy.steer(**tiny.SECOND_TAKES_ALL)
