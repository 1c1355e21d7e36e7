"""Excursions of the timetable: posterior samples in the pipeline's own loop, and a chain that they leave as it is."""

import math
import re

import numpy as np
import pytest
import torch

import tiny
from glassflows import BeamSearch, BestOfN, FeynmanKacSteerer, GLASSScheduler, Steerer
from glassflows.flow.solver import Solver
from glassflows.flow.timetable import excursion
from glassflows.scheduler.hooks import LookAhead, TransitionHook
from glassflows.smc.weights import normalise
from glassflows.steering.calibration import calibrate_from
from glassflows.steering.population import log_mean_exp
from schedules import FLOW, grid
from test_exact import steer

# ---- the law -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ends_are_draws_of_the_posterior():
    """Of N(0, 1): z given x_t has mean ẑ and variance 1/(1 + P), at every boundary."""
    ends, means = {}, {}

    class Watching(TransitionHook):
        def look_ahead(self, at):
            return LookAhead(12, 2) if at.index else None

        def arrived(self, at, z):
            ends.setdefault(at, []).append(z.flatten().double())

        def at_boundary(self, at, x_t, z):
            means[at] = z.flatten().double()

    scheduler, number = GLASSScheduler(num_transitions=5), 40_000
    scheduler.set_generator(tiny.seeded(1))
    scheduler.hook = Watching()
    scheduler.set_timesteps(50, sigmas=np.linspace(1, 1 / 50, 50))
    x = torch.randn(number, 1, generator=tiny.seeded(2))
    for t in scheduler.timesteps:
        level = FLOW.level(1 - float(t) / 1000)
        z = level.alpha * x / (level.alpha**2 + level.sigma**2)
        x = scheduler.step((x - z) / level.sigma, t, x).prev_sample
    assert len(ends) == 4
    for at, draws in ends.items():
        posterior = 1 / (1 + at.level.snr)
        residuals = [draw - means[at] for draw in draws]
        for residual in residuals:
            assert abs(residual.mean()) < 4 * math.sqrt(posterior / number)
            assert residual.var() / posterior == pytest.approx(1, abs=0.05)
            assert abs(torch.corrcoef(torch.stack([residual, means[at]]))[0, 1]) < 4 / math.sqrt(number)
        assert abs(torch.corrcoef(torch.stack(residuals))[0, 1]) < 4 / math.sqrt(number)
    assert x.var() == pytest.approx(1, abs=0.03)


@pytest.mark.slow
def test_values():
    """V̂ of many samples tends to V = λ ẑ + λ² v / 2 of N(0, 1) with r(z) = z; the mean of r(z) does not."""
    out = steer(3, 64, reward_scale=1.5, look_ahead=10, look_ahead_samples=400, ess_threshold=0.0, previews=False)
    plain = steer(3, 64, reward_scale=1.5, ess_threshold=0.0)
    predicted = plain.scored[:, 0]  # ẑ of the same particles
    for k, level in enumerate(grid(5)[1:5]):
        v = 1 / (1 + level.snr)
        errors = out.scored[k, 0] - (predicted[k] + 1.5 * v / 2)
        assert abs(errors.mean()) < 0.06
        assert errors.std() < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"twist": 1.0}, {"correlation": 0.3}], ids=str)
def test_the_target_stays(options):
    """E[Ẑ] = Z, and with few particles log Ẑ is the better for the look-ahead at equal particles."""
    runs = [
        steer(0, 8, prompt=["x"] * 512, reward_scale=1.0, look_ahead=m, look_ahead_samples=4, **options) for m in (0, 3)
    ]
    correlation = {key: value for key, value in options.items() if key == "correlation"}
    own = float(steer(5, 200_000, reward_scale=0.0, **correlation).rewards.var())
    ratio = (runs[1].log_evidence - own / 2).exp()
    assert abs(ratio.mean() - 1) < 3.5 * ratio.std() / math.sqrt(512)
    means = (normalise(runs[1].log_weights).exp() * runs[1].rewards).sum(-1)
    assert (ratio * means).sum() / ratio.sum() == pytest.approx(own, abs=0.12)  # Ẑ weighs groups of few particles


def test_log_mean_exp():
    ends = torch.randn(5, 2, 3, generator=tiny.seeded(0)).double()
    scale = torch.tensor([[2.0], [-0.5]]).double()
    expected = (scale * ends).exp().mean(0).log() / scale
    torch.testing.assert_close(log_mean_exp(ends, scale), expected)
    torch.testing.assert_close(log_mean_exp(ends, 0 * scale), ends.mean(0))
    assert log_mean_exp(1e4 * ends, scale).isfinite().all()


# ---- the chain -----------------------------------------------------------------------------------


MAKES = [tiny.flux, tiny.sd, tiny.flux_inpaint, tiny.sd_inpaint]


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKES)
def test_the_chain_is_as_without(make):
    """Bit for bit: excursions draw noise of their own and come back to the state they left."""
    options = {"ess_threshold": 0.0, "num_particles": 3, "num_inference_steps": 9}
    plain = tiny.Toy(make).steer(["a cat", "a dog"], **options)
    ahead = tiny.Toy(make).steer(["a cat", "a dog"], **options, look_ahead=2, look_ahead_samples=2)
    assert torch.equal(ahead.rewards, plain.rewards)
    assert np.array_equal(ahead.images, plain.images)
    assert not torch.equal(ahead.scored, plain.scored)
    assert plain.ledger.network_calls == 6 * 9
    assert ahead.ledger.network_calls == 6 * (9 + 2 * 2 * 2)
    assert ahead.ledger.reward_calls == 6 * (2 * 2 + 1)


HOSTS = [  # videos, sound beside them by a copy of the scheduler, two experts, sigmas by index, mirrored rows, lists
    "LTX2Pipeline", "LTXPipeline", "WanPipeline, two experts", "CogView4Pipeline", "DiTPipeline", "ZImagePipeline",
    "StableDiffusionXLPipeline", "AudioLDM2Pipeline", "StableVideoDiffusionPipeline", "Lumina2Pipeline",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("label", HOSTS)
def test_other_hosts(label):
    """The chain is as without in their loops, too, twisted as well, and the network is called as often as counted."""
    pytest.importorskip("diffusers", minversion="0.42")
    from zoo.survey import arguments, cases

    def contrast(samples, prompts):
        return 100 * samples.flatten(1).square().mean(1)

    case, outs = cases()[label], []
    for m in (0, 2):
        options = {"reward_scale": 10.0, "num_transitions": 2, "ess_threshold": 0.0, "twist": 0.5, "look_ahead": m}
        torch.manual_seed(0)
        steerer = FeynmanKacSteerer(case.build(), contrast, 2, **options)
        outs.append(steerer(**{**arguments(case), "output_type": "np"}))
    plain, ahead = outs
    np.testing.assert_allclose(ahead.images, plain.images, atol=1e-5)
    assert ahead.ledger.network_calls == plain.ledger.network_calls + 2 * 2
    assert plain.ledger.gradients == 2
    assert not torch.equal(ahead.scored, plain.scored)


def test_a_generator_of_the_call_is_left_alone(sd):
    """Stable Diffusion hands its generator to every step."""
    states = []
    for m in (0, 3):
        generator = tiny.seeded(4)
        sd.steer(generator=generator, look_ahead=m, ess_threshold=0.0)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_where_the_calls_are():
    """On the native grid where there are enough points; every call is told its own level."""
    toy, seen = tiny.Toy(tiny.flux).glass(3), []
    toy.pipe.scheduler.on_denoised = lambda call, z: seen.append(call)
    toy.steer(num_transitions=None, num_inference_steps=9, look_ahead=2, look_ahead_samples=2, ess_threshold=0.0)
    plain = [call.level for call in seen if call.excursion is None]
    assert len(plain) == 9
    away = [(call.excursion, call.level) for call in seen if call.excursion is not None]
    assert [number for number, _ in away] == [0, 0, 1, 1] * 2
    assert [plain.index(level) for _, level in away] == [5, 7] * 2 + [7, 8] * 2
    assert [call.index for call in seen] == list(range(9 + 8))
    assert {call.total for call in seen} == {17}


@pytest.mark.parametrize(("start", "number", "on_grid"), [(2, 3, True), (2, 7, True), (2, 8, False), (8, 3, False)])
def test_excursions_are_laid_between(start, number, on_grid):
    levels = grid(10)
    block = excursion(levels, start, number, schedule=FLOW, solver=Solver())
    times = [step.level.t for step in block.steps]
    assert len(times) == number + 1
    assert times[0] == levels[start].t
    assert all(now < then for now, then in zip(times, [*times[1:], 1.0], strict=True))
    assert all(step.level in levels for step in block.steps) == on_grid
    assert math.isinf(block.transition.lam_end)


def test_hosts_index_sigmas():
    """scheduler.sigmas[i] belongs to scheduler.timesteps[i], excursions included."""
    toy = tiny.Toy(tiny.flux).glass(3)
    seen, step = [], GLASSScheduler.step

    def noting(self, output, timestep, *args, **kwargs):
        index = 0 if self.step_index is None else self.step_index
        seen.append((float(timestep), 1000 * float(self.sigmas[index])))
        return step(self, output, timestep, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GLASSScheduler, "step", noting)
        toy.steer(num_transitions=None, look_ahead=2, ess_threshold=0.0)
    assert len(seen) == 6 + 2 * 2
    for told, sigma in seen:
        assert told == pytest.approx(sigma, rel=1e-5)


# ---- strategies and results ----------------------------------------------------------------------


def test_scores_are_those_of_the_ends(flux):
    """Previews show what was scored first; with one sample its reward is the score."""
    out = flux.steer(look_ahead=2, previews=True, ess_threshold=0.0, num_transitions=3)
    shown = out.previews.float() / 255
    scores = torch.stack([tiny.brightness(images, [""] * 4) for images in shown])
    torch.testing.assert_close(scores.double(), out.scored[:, 0], rtol=0, atol=2.5)
    plain = flux.steer(previews=True, ess_threshold=0.0, num_transitions=3)
    assert (plain.previews.int() - out.previews.int()).abs().max() > 2


@pytest.mark.parametrize("strategy", [BeamSearch(2)], ids=str)
def test_searches_look_ahead(flux, strategy):
    out = Steerer(flux.pipe, tiny.brightness, strategy, 4, num_transitions=3, look_ahead=1)(**flux.arguments())
    assert out.ledger.network_calls == 4 * (6 + 2)


def test_windows_spare_excursions(flux):
    out = flux.steer(look_ahead=2, start=0.6, num_transitions=3)
    assert out.transitions == (2,)
    assert out.ledger.network_calls == 4 * (6 + 2)


@pytest.mark.slow
@pytest.mark.parametrize("output_type", ["np", "pt", "pil", "latent"])
@pytest.mark.parametrize("make", [tiny.flux, tiny.sd])
def test_best_seen(make, output_type):
    """Of each prompt the best of all images, on the way and at the end, with its own reward."""
    seen = []

    def reward(images, prompts):
        scores = tiny.brightness(images, prompts)
        seen.append((images.clone(), scores))
        return scores

    options = {"ess_threshold": 0.0, "look_ahead": 2, "look_ahead_samples": 3, "num_inference_steps": 9}
    toy = tiny.Toy(make)
    out = toy.steer(["a cat", "a dog"], reward=reward, select="best_seen", output_type=output_type, **options)
    assert len(seen) == 3 * 2 + 1
    by_prompt = torch.stack([scores.view(2, 4) for _, scores in seen])
    best = by_prompt.amax((0, 2)).double()
    torch.testing.assert_close(out.image_rewards, best)
    assert (out.order < 0).any()  # some prompt's best is not a final one
    if output_type in ("np", "pt"):
        images = out.images if output_type == "pt" else torch.from_numpy(out.images).movedim(-1, 1)
        torch.testing.assert_close(tiny.brightness(images, [""] * 2).double(), best, rtol=1e-5, atol=1e-2)
    assert len(out.images) == 2


@pytest.mark.parametrize("make", [tiny.flux_inpaint, tiny.sd_inpaint])
def test_best_seen_keeps_what_inpainting_keeps(make):
    """Of the latents, the right half is that of every final sample."""
    toy = tiny.Toy(make)
    options = {"ess_threshold": 0.0, "look_ahead": 2, "look_ahead_samples": 4, "output_type": "latent"}
    for seed in range(8):
        out = toy.steer(select="best_seen", seed=seed, **options)
        if (out.order < 0).all():
            break
    assert (out.order < 0).all()
    finals = toy.steer(seed=seed, **options).images
    kept = (finals[1:] == finals[:1]).all(0)  # in all of them the same
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(out.images[0][kept], finals[0][kept])
    assert not torch.isclose(out.images[0], finals[0])[~kept].any(0).all()


@pytest.mark.parametrize("scale", [-1.0, [0.0, 0.0, -1.0]], ids=str)
def test_best_seen_is_the_best_for_the_target(flux, scale):
    """Of a negative λ_r it is the lowest, whatever a schedule has on the way."""
    seen = []

    def reward(images, prompts):
        seen.append(tiny.brightness(images, prompts))
        return seen[-1]

    options = {"look_ahead": 2, "look_ahead_samples": 3, "ess_threshold": 0.0}
    out = flux.steer(reward=reward, reward_scale=scale, select="best_seen", num_inference_steps=9, **options)
    torch.testing.assert_close(out.image_rewards, torch.cat(seen).min()[None].double())


def test_best_seen_that_sees_nothing_says_so(flux):
    steerer = Steerer(flux.pipe, tiny.brightness, BestOfN(1.0), 4, look_ahead=2)
    with pytest.warns(UserWarning, match="scored no particles on the way"):
        out = steerer(select="best_seen", **flux.arguments())
    assert out.order.min() >= 0


def test_calibration_is_on_what_is_scored(flux):
    """Scores of a calibrated run are those that it was calibrated on; another look-ahead is refused."""
    steerer = flux.steerer(reward_scale=1.0, look_ahead=2, look_ahead_samples=2, ess_threshold=0.0, num_particles=6)
    call = flux.arguments(["a cat", "a dog", "a cow", "a pig"])
    found = steerer.calibrate(**call | {"generator": tiny.seeded(0)})
    assert (found.look_ahead, found.look_ahead_samples) == (2, 2)
    out = steerer(**call | {"generator": tiny.seeded(0)})
    again = calibrate_from(out.scored, out.rewards, found.num_calls)
    assert again.slopes == pytest.approx(found.slopes, rel=1e-9)
    steerer.look_ahead = 1
    with pytest.raises(ValueError, match="calibration: expected look_ahead=2 with 2 sample"):
        steerer(**call)


def test_best_seen_is_saved(flux, tmp_path):
    options = {"ess_threshold": 0.0, "look_ahead": 2, "look_ahead_samples": 3}
    out = flux.steer(select="best_seen", **options)
    assert type(out).load(out.save(tmp_path / "out")) == out
    assert out.seen.shape == (1,)
    out.plot()
    assert "best reward" in repr(out)


def test_with_micro_batches_and_twist(flux):
    options = {
        "look_ahead": 2, "twist": 0.5, "reward_scale": 1.0, "reward": lambda i, p: 1000 * i.flatten(1).mean(1)
    }  # fmt: skip
    whole = flux.steer(**options)
    parts = flux.steer(**options, particle_batch_size=3, decode_batch_size=2)
    torch.testing.assert_close(parts.rewards, whole.rewards, rtol=1e-4, atol=1e-2)
    assert whole.ledger == parts.ledger


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"look_ahead": -1}, "look_ahead: expected a whole number of at least 1, got -1"),
        ({"look_ahead": 1.5}, "look_ahead: expected a whole number"),
        ({"look_ahead": True}, "look_ahead: expected a whole number"),
        ({"look_ahead": 1, "look_ahead_samples": 0}, "look_ahead_samples: expected a whole number"),
    ],
)
def test_options_are_checked(flux, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        flux.steerer(**options)


def test_best_seen_needs_a_look_ahead(flux):
    with pytest.raises(ValueError, match='select="best_seen": expected look_ahead'):
        flux.steer(select="best_seen")
    with pytest.raises(ValueError, match="expected num_images_per_prompt of 1"):
        flux.steer(select="best_seen", look_ahead=1, num_images_per_prompt=2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [tiny.flux_img2img, tiny.sd_img2img])
@pytest.mark.parametrize("strength", [0.5, 0.9])
def test_runs_that_begin_later_are_refused(make, strength):
    """Some hosts count excursions where a strength begins, and would begin at another noise level."""
    toy = tiny.Toy(make)
    before = toy.run()
    with pytest.raises(ValueError, match="look_ahead: expected a run from the first of scheduler.timesteps on"):
        toy.steer(look_ahead=2, look_ahead_samples=4, strength=strength, num_inference_steps=10)
    assert np.array_equal(toy.run(), before)


def test_full_strength_is_a_run_from_the_first():
    toy = tiny.Toy(tiny.flux_img2img)
    plain, ahead = (toy.steer(strength=1.0, ess_threshold=0.0, look_ahead=m) for m in (0, 2))
    assert torch.equal(plain.rewards, ahead.rewards)
    assert not torch.equal(plain.scored, ahead.scored)


@pytest.mark.parametrize("window", [{"control_guidance_start": 0.2}, {"control_guidance_end": [0.8]}])
def test_windows_over_steps_are_refused(window):
    """They are fractions of the list of timesteps, in which excursions are."""
    pytest.importorskip("diffusers", minversion="0.42")
    from zoo.survey import arguments, cases

    case = cases()["StableDiffusionControlNetPipeline"]
    steerer = FeynmanKacSteerer(
        case.build(),
        lambda images, _: images.flatten(1).mean(1),
        2,
        num_transitions=2,
        reward_scale=500.0,
        look_ahead=1,
    )
    with pytest.raises(ValueError, match=next(iter(window))):
        steerer(**arguments(case), **window)
    assert steerer(**arguments(case)).ledger.network_calls > 0


def test_adapters_that_count_steps_are_refused():
    pytest.importorskip("diffusers", minversion="0.42")
    from zoo.survey import arguments, cases

    case = cases()["StableDiffusionXLAdapterPipeline"]
    steerer = FeynmanKacSteerer(case.build(), lambda images, _: images.flatten(1).mean(1), 2, look_ahead=1)
    with pytest.raises(ValueError, match="whose adapter_conditioning_factor counts them"):
        steerer(**arguments(case))
