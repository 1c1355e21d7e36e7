"""Width over time: a population that shrinks, in closed forms, in real pipelines, and in what is told of it."""

import io
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import tiny
from glassflows import BestOfN, FeynmanKac, GLASSScheduler, Halving, Steerer, SteeringResult
from glassflows.flow.noise import RectifiedFlow
from glassflows.host.decode import PipelineCall, decoder
from glassflows.host.microbatch import Living, networks_in_micro_batches
from glassflows.host.run import PipelineRun
from glassflows.scheduler import Boundary
from glassflows.smc import filter as smc
from glassflows.smc.resampling import RESAMPLING
from glassflows.smc.weights import log_mean, normalise
from glassflows.steering import Decision, Outcome
from glassflows.steering.widths import new_width
from test_exact import Exact, steer
from test_interrupt import interrupted
from test_microbatch import PIPELINES, rows_seen
from test_network_rows import ZOO, compare, in_double_precision, network, rows, same, steered, tolerances
from test_resampling import generators, hard_weights
from test_twist import deviation, evidence, off
from zoo.survey import arguments, cases, sampled

WIDTHS = (8, 4, 2)


def brightness(images, prompts):
    return 1000 * images.mean((1, 2, 3))


def halved(toy, widths=WIDTHS, prompt=None, **options):
    steerer = Steerer(toy.pipe, options.pop("reward", brightness), Halving(widths), widths[0], num_transitions=3)
    return steerer(**toy.arguments(prompt, **options))


def boundary(index, total, stochastic=True, **options):
    return Boundary(index, total, RectifiedFlow().level(index / total), stochastic, **options)


# ---- resampling to fewer ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [3, 1, 10])
@pytest.mark.parametrize("name", RESAMPLING)
def test_children(name, number):
    """On average N W of N, of every scheme, and as near as it promises; none of weight zero."""
    weights, repeats = hard_weights(), 250
    given, total = generators(50), torch.zeros(50, 7, dtype=torch.float64)
    for _ in range(repeats):
        ancestors = RESAMPLING[name](weights.log(), given, number)
        assert ancestors.shape == (50, number)
        counts = torch.nn.functional.one_hot(ancestors, 7).sum(1).double()
        total += counts
        assert (ancestors.diff() >= 0).all()
        assert (counts[weights == 0] == 0).all()
        if name in ("systematic", "ssp", "residual"):
            assert (counts >= (number * weights + 1e-9).floor()).all()
        if name in ("systematic", "ssp"):
            assert (counts <= (number * weights - 1e-9).ceil()).all()
        if name == "stratified":
            assert ((counts - number * weights).abs() < 2).all()
    scatter = (number * weights * (1 - weights)).sqrt() / math.sqrt(repeats)  # of the multinomial, the widest
    assert ((total / repeats - number * weights).abs() <= 5 * scatter + 1e-9).all()


def test_survivors_stand_for_all():
    """They have equal weights, the history of their parents, and the mean weight of all joins the evidence."""
    scaled = torch.randn(3, 6, generator=tiny.seeded(), dtype=torch.float64)
    state = smc.FilterState(scaled, torch.tensor([0.1, 0.2, 0.3]).double(), scaled[None], scaled)
    new, info = smc.step(state, scaled.flip(1), ess_threshold=0.0, generators=generators(3), number=2)
    weights = scaled + scaled.flip(1) - scaled
    assert info.resampled.all()
    assert info.ancestors.shape == (3, 2)
    assert torch.equal(new.log_weights, torch.zeros(3, 2, dtype=torch.float64))
    torch.testing.assert_close(new.log_evidence, state.log_evidence + log_mean(weights))
    history = torch.stack([scaled, scaled.flip(1)])
    assert torch.equal(new.scaled, history.gather(2, info.ancestors.expand(2, 3, 2)))
    torch.testing.assert_close(new.paid, weights.gather(1, info.ancestors))


# ---- closed forms ----------------------------------------------------------------------------------------------------

GROUPS = 2048


def tilted_mean_off(out, exact):
    """Return by how many standard errors E[Ẑ Σ W z] misses E[z e^z] = Z Var, of N(0, Var)."""
    estimates = (out.log_evidence - exact).exp() * (normalise(out.log_weights).exp() * out.rewards).sum(1)
    return deviation(estimates, 2 * exact)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resampling": "multinomial"},
        {"resampling": "ssp"},
        {"resampling": "residual"},
        {"resampling": "stratified"},
        {"potential": "max"},
        {"ess_threshold": 0.0, "start": 1.0},
        {"ess_threshold": 1.0},
        {"reward_scale": [0.1, 0.2, 0.5, 0.7, 1.0]},
        {"num_transitions": 50},
        {"twist": 1.0},
        {"twist": 1.0, "start": 0.5},
    ],
    ids=str,
)
def test_evidence_and_mean_stay_unbiased(options):
    """Of N(0, Var) tilted by e^z, 8 → 4 → 2: E[Ẑ] = e^(Var/2), and E[Ẑ Σ W z] = Var e^(Var/2)."""
    exact = evidence() / 4 if "num_transitions" not in options else ancestral()
    out = steer(0, 8, prompt=["x"] * 1024, **({"reward_scale": 1.0, "widths": WIDTHS} | options))
    assert out.rewards.shape == (1024, 2)
    assert abs(off(out, exact)) < 3
    assert abs(tilted_mean_off(out, exact)) < 3


def ancestral():
    """log E[exp(z)] of 50 transitions of one call each."""
    return float(steer(5, 200_000, reward_scale=0.0, num_transitions=50).rewards.var()) / 2


def dropping_evidence(step):
    def wrong(state, *args, **kwargs):
        new, info = step(state, *args, **kwargs)
        kept = state.log_evidence if kwargs["number"] else new.log_evidence
        return smc.FilterState(new.log_weights, kept, new.scaled, new.paid), info

    return wrong


def keeping_weights(step):
    """The survivors' weights count twice: in the evidence, and on."""

    def wrong(state, *args, **kwargs):
        new, info = step(state, *args, **kwargs)
        weights = state.log_weights + info.log_potential
        kept = weights.gather(1, info.ancestors) if kwargs["number"] else new.log_weights
        return smc.FilterState(kept, new.log_evidence, new.scaled, new.paid), info

    return wrong


def truncating(step):
    """The first ones go on, as if they had been drawn."""

    def wrong(state, *args, **kwargs):
        if kwargs["number"]:
            kwargs["resampling"] = lambda weights, generators, number: torch.arange(number)[None]
        return step(state, *args, **kwargs)

    return wrong


def keeping_the_best(step):
    def wrong(state, *args, **kwargs):
        if kwargs["number"]:
            kwargs["resampling"] = lambda weights, generators, number: weights.topk(number).indices
        return step(state, *args, **kwargs)

    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [dropping_evidence, keeping_weights, truncating, keeping_the_best])
def test_wrong_ways_to_shrink_are_seen(wrong, monkeypatch):
    monkeypatch.setattr(smc, "step", wrong(smc.step))
    out = steer(0, 8, prompt=["x"] * GROUPS, reward_scale=1.0, widths=WIDTHS, ess_threshold=0.0)
    assert max(abs(off(out, evidence() / 4)), abs(tilted_mean_off(out, evidence() / 4))) > 5


@pytest.mark.slow
def test_many_particles_reach_the_tilted_mean():
    """N(0, 1) tilted by e^(2z), 4000 → 2000 → 1000: mean and log Ẑ are 2 Var."""
    runs = [steer(seed, 4000, widths=(4000, 2000, 1000)) for seed in range(12)]
    means = [float((normalise(out.log_weights).exp() * out.rewards).sum()) for out in runs]
    for values in (means, [float(out.log_evidence) for out in runs]):
        assert abs(np.mean(values) - evidence()) < 3 * np.std(values) / math.sqrt(12) + 0.02


@pytest.mark.slow
def test_two_prompts_of_different_tilts():
    tilts = {"up": 1.0, "down": -0.5}

    def tilt(z, prompts):
        return z.flatten() * torch.tensor([tilts[prompt] for prompt in prompts])

    out = steer(0, 8, prompt=["up", "down"] * 1024, reward=tilt, reward_scale=1.0, widths=WIDTHS)
    for group, slope in enumerate(tilts.values()):
        ratio = (out.log_evidence[group::2] - slope**2 * evidence() / 4).exp()
        assert abs(deviation(ratio, 1.0)) < 3


@pytest.mark.slow
def test_a_best_of_n_that_drops_half_unseen_is_a_best_of_half():
    """Halving by a reward that tells nothing leaves draws of the model itself."""
    seen = []

    def late(z, prompts):
        seen.append(len(z))
        return z.flatten() if len(seen) % 3 == 0 else torch.rand(len(z), generator=tiny.seeded(len(seen)))

    pipe = Exact(FlowMatchEulerDiscreteScheduler())
    pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler)
    pipe.scheduler.set_generator(tiny.seeded(5))
    steerer = Steerer(pipe, late, Halving(WIDTHS), 8, decode=lambda z: z)
    out = steerer(["x"] * GROUPS, num_inference_steps=50, generator=tiny.seeded(6), output_type="latent")
    assert seen == [8 * GROUPS, 4 * GROUPS, 2 * GROUPS]
    best = out.rewards.amax(1)  # of two of N(0, Var): √(Var / π)
    assert abs(deviation(best, math.sqrt(evidence() / 2 / math.pi))) < 3
    assert out.log_evidence.isnan().all()


# ---- where it shrinks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 5])
@pytest.mark.parametrize("total", [5, 6, 7, 11, 20])
def test_parts_are_as_even_as_possible(total, number):
    widths = tuple(range(number, 0, -1))
    starts = [int(part[0]) for part in np.array_split(np.arange(total), number)]
    expected = {start: width for start, width in zip(starts, widths, strict=True) if start}
    assert {k: new_width(widths, k, total) for k in range(total) if new_width(widths, k, total)} == expected
    for strategy in (Halving(widths), FeynmanKac(widths=widths, start=1.0, stop=1.0)):
        assert [k for k in range(1, total) if strategy.due(boundary(k, total))] == list(expected)


@pytest.mark.parametrize(("start", "score_every", "due"), [(0.0, 2, [1, 2, 3, 4, 5]), (0.7, 1, [2, 4, 5])])
def test_the_window_adds_to_the_shrinking_boundaries(start, score_every, due):
    strategy = FeynmanKac(widths=(8, 4, 2), start=start, score_every=score_every)
    assert [k for k in range(1, 6) if strategy.due(boundary(k, 6))] == due


def test_halving_keeps_the_best_in_their_order():
    rewards = torch.tensor([[3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0], [2.0, 7.0, 1.0, 8.0, 2.0, 8.0, 1.0, 8.0]])
    _, decision = Halving((8, 3)).step(None, rewards.double(), boundary(1, 2), generators(2))
    assert decision.alive == 3
    assert decision.ancestors[:, :3].tolist() == [[4, 5, 7], [3, 5, 7]]
    assert decision.ancestors[:, 3:].tolist() == [[3, 4, 5, 6, 7]] * 2
    assert decision.resampled.all()
    _, everyone = Halving((8, 8)).step(None, rewards.double(), boundary(1, 2), generators(2))
    assert everyone.ancestors.tolist() == [[*range(8)]] * 2
    assert not everyone.resampled.any()


def test_of_ties_the_first_are_kept():
    _, decision = Halving((6, 2)).step(None, torch.zeros(1, 6).double(), boundary(1, 2), generators(1))
    assert decision.ancestors[0, :2].tolist() == [0, 1]


def test_a_width_that_stays_resamples(flux):
    """FeynmanKac(widths=(4, 4)) is constant width, resampled at the start of the second part."""
    options = {"num_particles": 4, "num_transitions": 2, "reward_scale": 1.0}
    kept = flux.steer(**options, widths=(4, 4), ess_threshold=0.0)
    forced = flux.steer(**options, ess_threshold=1.0)
    assert kept.resampled.all()
    for name in ("ancestors", "log_weights", "log_evidence", "rewards", "scored", "ess", "order"):
        assert torch.equal(getattr(kept, name), getattr(forced, name))
    assert np.array_equal(kept.images, forced.images)
    assert kept.ledger == forced.ledger


def test_one_width_is_no_width(flux):
    one, none = (flux.steer(widths=widths, reward_scale=1.0) for widths in ([4], None))
    assert np.array_equal(one.images, none.images)
    assert torch.equal(one.log_weights, none.log_weights)


def test_nothing_random_follows_a_last_transition_of_one_call(flux):
    """FeynmanKac splits the others, weighs there and copies nothing; Halving drops there, too."""
    options = {"num_inference_steps": 3, "num_transitions": 3, "reward_scale": 1.0}
    out = flux.steer(num_particles=8, widths=(8, 4), **options)
    assert out.widths == (8, 4, 4)
    assert out.resampled[:, 0].tolist() == [True, False]
    assert not torch.equal(out.log_weights[0], torch.full((4,), -math.log(4)).double())
    dropped = halved(flux, num_inference_steps=3)
    assert dropped.widths == (8, 4, 2)
    assert np.abs(dropped.images[0] - dropped.images[1]).max() > 1e-3


def test_more_calls_let_the_last_part_be_one_transition(flux):
    out = flux.steer(num_particles=8, widths=WIDTHS, num_inference_steps=6, num_transitions=3, reward_scale=1.0)
    assert out.widths == (8, 4, 2)


# ---- the same samples ------------------------------------------------------------------------------------------------


def seeing_all(monkeypatch):
    """Let networks and decoders see the rows of all particles, also of those that rest."""
    monkeypatch.setattr(PipelineRun, "work_on", lambda run, living, num_frames: None)


@pytest.mark.slow
@pytest.mark.parametrize("label", [*PIPELINES, "AnimateDiffPipeline", "StableVideoDiffusionPipeline", "LattePipeline"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*next to nothing")
def test_those_that_rest_change_nothing(label, monkeypatch):
    case = cases()[label]
    toy = tiny.Toy(case.build, {name: value for name, value in arguments(case).items() if name != "generator"})
    if "decode_chunk_size" in toy.call:
        toy.call["decode_chunk_size"] = 3  # all frames of a video, which else shares a chunk with the next
    options = {"num_particles": 5, "num_transitions": 3, "num_inference_steps": 6, "reward_scale": 1.0}

    def reward(samples, prompts):
        return 100 * samples.flatten(1).mean(1)

    def run(**more):
        return toy.steer(reward=reward, **options, widths=(5, 3, 2), **more)

    with np.errstate(all="raise"):
        fewer, parts = run(), run(particle_batch_size=2, decode_batch_size=1)
    seeing_all(monkeypatch)
    everyone = run()
    assert fewer.widths[0] == 5
    assert len(fewer.images) == fewer.widths[-1] < 5
    for other in (fewer, parts):
        assert torch.equal(other.ancestors, everyone.ancestors)
        np.testing.assert_allclose(other.images, everyone.images, atol=5e-5)
        torch.testing.assert_close(other.rewards, everyone.rewards, rtol=0, atol=1e-2)
        assert other.ledger == everyone.ledger
        for name, value in other.others.items():  # the sound of LTX-2
            np.testing.assert_allclose(value, everyone.others[name], atol=5e-5)
    for name in case.networks:
        assert "forward" not in vars(getattr(toy.pipe, name))
    assert "decode_latents" not in vars(toy.pipe)


@pytest.mark.zoo
@tiny.DIFFUSERS_42
@pytest.mark.slow
@pytest.mark.parametrize("label", sampled(ZOO))
@pytest.mark.filterwarnings("ignore")
def test_those_that_rest_change_nothing_in_the_zoo(label, monkeypatch):
    """Latents and images of every pipeline, of numbers that divide nothing; rounding is judged in double precision."""
    case = cases()[label]
    work_on = PipelineRun.work_on

    def compare_all(case):
        monkeypatch.setattr(PipelineRun, "work_on", work_on)
        options = {"widths": (7, 4), "num_inference_steps": 8}
        latents, pixels = tolerances(case)
        if case.name == "Kandinsky5I2VPipeline":
            pixels = math.inf  # in the end it shifts frames by means over all rows, of which there are fewer
        fewer, parts = (steered(case, 7, size, decode=size, **options) for size in (None, 3))
        seeing_all(monkeypatch)
        everyone = steered(case, 7, None, **options)
        assert everyone[1].widths == (7, 4)
        for other in (fewer, parts):
            compare(everyone, other, latents, pixels)

    try:
        compare_all(case)
    except AssertionError:
        compare_all(in_double_precision(case))


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny.flux, tiny.sd])
@pytest.mark.parametrize("how", ["FeynmanKac", "Halving"])
def test_two_prompts_in_micro_batches(make, how, monkeypatch):
    toy, prompts = tiny.Toy(make), ["a cat", "a dog"]

    def run(size=None):
        if how == "FeynmanKac":
            sizes = {"particle_batch_size": size, "decode_batch_size": size, "reward_batch_size": size}
            return toy.steer(prompts, num_particles=8, widths=WIDTHS, reward_scale=1.0, **sizes)
        return halved(toy, prompt=prompts)

    fewer, parts = run(), run(3)
    seeing_all(monkeypatch)
    everyone = run()
    for other in (fewer, parts):
        assert torch.equal(other.ancestors, everyone.ancestors)
        np.testing.assert_allclose(other.images, everyone.images, atol=5e-5)


def test_guidance_that_rescales_divides_by_no_zero(sd):
    """Rows that rest are copies: their guided prediction has a spread to divide by."""
    seen = []
    with np.errstate(all="raise"):
        sd.steer(
            num_particles=8, widths=WIDTHS, reward_scale=1.0, guidance_rescale=0.7, output_type="pil",
            callback_on_step_end=lambda pipe, i, t, given: seen.append(given["latents"].clone()) or given,
        )  # fmt: skip
    assert len(seen) == 6
    assert all(latents.isfinite().all() and len(latents) == 8 for latents in seen)


@pytest.mark.slow
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("select", ["all", "best", "sample"])
def test_every_form(flux, output_type, select):
    out = flux.steer(
        ["a cat", "a dog"], num_particles=8, widths=(8, 3), reward_scale=1.0, output_type=output_type, select=select
    )
    assert len(out.images) == out.order.numel() == (2 if select == "best" else 6)
    assert out.order.max() < 3
    if output_type == "pt":
        torch.testing.assert_close(out.image_rewards, brightness(out.images, None).double(), rtol=0, atol=1e-3)


def test_rewards_of_latents(sd):
    seen = []

    def reward(latents, prompts):
        seen.append((latents.clone(), prompts))
        return latents.flatten(1).mean(1)

    out = sd.steer(
        ["a", "b"], reward=reward, decode="latents", num_particles=8, widths=WIDTHS, reward_scale=1.0,
        output_type="latent",
    )  # fmt: skip
    assert [len(latents) for latents, _ in seen] == [16, 8, 4]
    assert [prompts for _, prompts in seen] == [["a"] * n + ["b"] * n for n in WIDTHS]
    by_slot = out.images.view(2, 2, *out.images.shape[1:])
    for prompt in range(2):
        assert torch.equal(by_slot[prompt][out.order[prompt].argsort()], seen[-1][0][2 * prompt : 2 * prompt + 2])


# ---- what sees how many rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "copies"), [(tiny.flux, 1), (tiny.sd, 2)])
@pytest.mark.parametrize("size", [None, 3])
def test_networks_and_decoders_see_those_that_live(make, copies, size):
    """Three transitions of two calls: the call at a boundary is of those before it."""
    toy = tiny.Toy(make)
    network = rows_seen(toy.network.x_embedder if make is tiny.flux else toy.network.conv_in)
    decoded, scored = rows_seen(toy.pipe.vae.decoder), []

    def reward(images, prompts):
        scored.append(len(images))
        return brightness(images, prompts)

    sizes = {"particle_batch_size": size, "decode_batch_size": size, "reward_batch_size": size}
    out = toy.steer(reward=reward, num_particles=8, widths=WIDTHS, reward_scale=1.0, **sizes)

    def split(numbers):
        return [min(size or 8, n - i) for n in numbers for i in range(0, n, size or 8)]

    assert network == [copies * n for n in split([8, 8, 8, 4, 4, 2])]
    assert decoded == split([8, 4, 2])
    assert scored == split([8, 4, 2])
    assert out.ledger.network_calls == 8 + 8 + 8 + 4 + 4 + 2
    assert (out.ledger.decodes, out.ledger.reward_calls) == (8 + 4, 8 + 4 + 2)


def test_halving_scores_where_it_drops(flux):
    out = halved(flux)
    assert out.ledger.reward_calls == 8 + 4 + 2
    assert out.ledger.network_calls == 8 + 8 + 8 + 4 + 4 + 2
    assert halved(flux, (8, 2)).ledger.reward_calls == 8 + 2


@pytest.mark.slow
@pytest.mark.parametrize("label", ["AnimateDiffPipeline", "StableVideoDiffusionPipeline", "LattePipeline"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*next to nothing")
def test_frames_of_those_that_live_are_decoded(label):
    case = cases()[label]
    toy = tiny.Toy(case.build, {name: value for name, value in arguments(case).items() if name != "generator"})
    seen = {}
    for widths in (None, (6, 2)):
        seen[widths] = rows_seen(toy.pipe.vae.decoder)
        toy.steer(
            reward=lambda samples, prompts: samples.flatten(1).mean(1), num_particles=6, num_transitions=2,
            num_inference_steps=4, widths=widths, start=1.0,
        )  # fmt: skip
    constant = sum(seen[None]) - sum(seen[6, 2])  # both are noted by the first
    on_the_way_and_final = sum(seen[6, 2])
    assert on_the_way_and_final == constant + constant // 3


@pytest.mark.parametrize("make", [tiny.flux, tiny.sd])
def test_twisted_rows_are_those_that_live(make):
    toy = tiny.Toy(make)
    out = toy.steer(
        ["a cat", "a dog"], reward=brightness, num_particles=8, widths=WIDTHS, twist=1.0, reward_scale=0.1,
        num_inference_steps=9,
    )  # fmt: skip
    assert out.ledger.gradients == 2 * (8 + 4)
    assert out.rewards.isfinite().all()
    assert out.widths == WIDTHS


def test_excursions_are_of_those_that_live(flux):
    """Scored are the ends of excursions, of one further call each, of the particles before a boundary."""
    seen = rows_seen(flux.network.x_embedder)
    out = flux.steer(num_particles=8, widths=WIDTHS, reward_scale=1.0, look_ahead=1)
    assert sum(seen) == out.ledger.network_calls
    assert seen == [8, 8, 8, 8, 4, 4, 4, 2]


def test_rows_that_rest_get_what_others_got():
    """Of every guidance condition, in whatever form a network returns it, in parts and at once."""

    def forward(self, sample, scale=1.0):
        calls.append(len(sample))
        first = torch.stack(sample) if isinstance(sample, list) else sample
        return {"sample": first * 2, "mean": first.mean(), "pair": (first + scale, None)}

    calls, net = [], network("SomeTransformer", forward)
    x, living = rows(12, 4), Living(6, True, torch.tensor([0, 1, 3]))
    expected = x.view(2, 6, 4)[:, [0, 1, 0, 3, 1, 3]].reshape(12, 4)
    for size, seen in ((None, [6]), (2, [4, 2]), (1, [2, 2, 2])):
        calls.clear()
        out = networks_in_micro_batches(net, net.forward, 6, size, living)(x)
        assert calls == seen
        same(out["sample"], 2 * expected)
        same(out["pair"][0], expected + 1)
        same(out["mean"], x.view(2, 6, 4)[:, [0, 1, 3]].mean())
    listed = network("ZImageTransformer2DModel", lambda self, x: ([2 * one for one in x],))
    same(torch.stack(networks_in_micro_batches(listed, listed.forward, 6, 2, living)(list(x))[0]), 2 * expected)
    living.chosen = None
    same(networks_in_micro_batches(net, net.forward, 6, None, living)(x)["sample"], 2 * x)


# ---- interrupted, and put back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 3, 4, 5])
def test_interrupted(toy, after):
    """The images are the last predictions of those that lived then."""
    seen = rows_seen(toy.pipe.vae.decoder)
    out, predicted = interrupted(toy, after, num_particles=8, widths=WIDTHS, reward_scale=1.0)
    alive = {1: 8, 3: 4, 4: 4, 5: 2}[after]
    assert out.interrupted
    assert out.rewards.shape == (1, alive)
    assert seen[-1] == alive  # what is returned is decoded once
    rows = out.ancestors[-1, 0, :alive] if after in (3, 5) else torch.arange(alive)  # a boundary tells of all
    expected = decoder(PipelineCall(toy.pipe, toy.call))(predicted[-1][rows]).movedim(1, -1).detach().numpy()
    np.testing.assert_allclose(out.images[out.order[0].argsort()], expected, atol=5e-5)


@pytest.mark.parametrize("where", ["end", "network", "reward"])
def test_the_pipeline_is_as_before(toy, where):
    before, attributes, scheduler = toy.run(), set(vars(toy.pipe)), toy.pipe.scheduler
    calls = []

    def failing():
        calls.append(1)
        if len(calls) == {"end": 0, "network": 5, "reward": 2}[where]:
            raise KeyboardInterrupt

    def reward(images, prompts):
        if where == "reward":
            failing()
        return brightness(images, prompts)

    handle = toy.network.register_forward_pre_hook(lambda *args: failing() if where == "network" else None)
    with pytest.raises(KeyboardInterrupt) if where != "end" else nullcontext():
        toy.steer(reward=reward, num_particles=8, widths=WIDTHS, reward_scale=1.0)
    handle.remove()
    assert set(vars(toy.pipe)) == attributes
    assert toy.pipe.scheduler is scheduler
    assert "forward" not in vars(toy.network)
    assert "decode" not in vars(toy.pipe.vae)
    assert np.array_equal(toy.run(), before)


# ---- strategies of one's own -----------------------------------------------------------------------------------------


class DropsTheWorst:
    """One at each boundary; nothing of it is announced."""

    def __init__(self, number=1):
        self.number = number

    def due(self, at):
        return True

    def init(self, groups, particles):
        return particles

    def step(self, state, rewards, at, generators):
        assert rewards.shape[1] == state
        order = rewards.argsort(1, descending=True)
        return state - self.number, Decision.keep(rewards)._replace(ancestors=order, alive=state - self.number)

    def finish(self, state, rewards, total):
        assert rewards.shape[1] == state
        return Outcome.without_law(rewards)


def own(toy, number=1, **options):
    return Steerer(toy.pipe, brightness, DropsTheWorst(number), 4, num_transitions=3)(**toy.arguments(**options))


def test_a_strategy_of_ones_own(flux):
    """Though it says nothing of moved particles, those that go on are the ones it names."""
    seen = rows_seen(flux.network.x_embedder)
    out = own(flux)
    assert out.widths == (4, 3, 2)
    assert seen == [4, 4, 4, 3, 3, 2]
    assert len(out.images) == 2
    assert out.scored[1, 0, :3].isfinite().all()
    assert torch.equal(out.ancestors[0, 0, :3], out.scored[0, 0].argsort(descending=True)[:3])
    with pytest.raises(ValueError, match="num_images_per_prompt: expected 1 to 2, the particles .* got 3: ask for"):
        own(flux, num_images_per_prompt=3)


@pytest.mark.parametrize("number", [-1, 4, 0.5])
def test_what_it_names_is_checked(flux, number):
    with pytest.raises(ValueError, match=r"^alive: expected 1 to 4, the particles of a prompt that lived, got .*: ret"):
        own(flux, number)


def test_a_strategy_without_widths_is_as_ever(flux):
    out = Steerer(flux.pipe, brightness, BestOfN(), 4, num_transitions=3)(**flux.arguments())
    assert out.rewards.shape == (1, 4)
    assert out.widths == (4,)


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result():
    return tiny.Toy(tiny.flux).steer(
        ["a cat", "a dog"], num_particles=8, widths=WIDTHS, num_transitions=4, num_inference_steps=8, reward_scale=1.0,
        ess_threshold=1.0, previews=True, output_type="pil",
    )  # fmt: skip


def test_what_a_result_holds(result):
    """Four transitions in three parts, (0, 1), (2), (3): scored at 1, 2 and 3, the last two of which shrink."""
    assert result.transitions == (1, 2, 3)
    assert result.widths == (8, 8, 4, 2)
    assert result.rewards.shape == result.log_weights.shape == result.order.shape == (2, 2)
    assert result.scored.shape == result.ancestors.shape == (3, 2, 8)
    for k, (before, after) in enumerate([(8, 8), (8, 4), (4, 2)]):
        assert result.scored[k, :, :before].isfinite().all()
        assert result.scored[k, :, before:].isnan().all()
        assert ((result.ancestors[k, :, :after] >= 0) & (result.ancestors[k, :, :after] < before)).all()
        assert (result.ancestors[k, :, after:] == -1).all()
        shown = result.previews[k].view(2, 8, -1)
        assert (shown[:, :before].amax(2) > 0).all()
        assert (shown[:, before:] == 0).all()
    torch.testing.assert_close(result.log_weights.exp().sum(1), torch.ones(2).double())
    assert result.diversity.shape == (2,)
    assert result.image_rewards.shape == (4,)
    assert len(result.images) == 4


def test_lineages(result):
    for prompt in range(2):
        ends = [result.lineage(prompt, slot) for slot in range(2)]
        assert [end[-1] for end in ends] == [0, 1]
        assert result.lineage(prompt) == ends[int(result.best[prompt])]
        assert all(min(end) >= 0 for end in ends)
        assert int(result.lineages[prompt]) == len({end[0] for end in ends})


def test_a_line_and_html(result):
    assert "2 prompts × 8 → 4 → 2 particles" in repr(result)
    assert "of 8 → 4; " in repr(result)
    assert result._repr_html_().count("<img") == 4


def test_saved_and_loaded(result, tmp_path):
    loaded = SteeringResult.load(result.save(tmp_path))
    assert loaded == result
    assert loaded.widths == result.widths
    assert loaded.recipe["steerer"]["widths"] == [8, 4, 2]
    assert loaded.recipe["call"]["num_images_per_prompt"] == 2
    assert FeynmanKac(widths=loaded.recipe["steerer"]["widths"]).widths == (8, 4, 2)
    pictures = []
    for one in (result, loaded):
        buffer = io.BytesIO()
        one.plot(1).savefig(buffer, format="rgba", dpi=50)
        pictures.append(buffer.getvalue())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("widths", [(8, 4, 2), (16, 8, 4), (3, 1)])
def test_figures_show_those_that_lived(flux, widths):
    """As pictures or dots with a line to the parent, and nobody where nobody lived."""
    out = flux.steer(num_particles=widths[0], widths=widths, reward_scale=1.0, previews=True)
    figure = out.plot()
    figure.canvas.draw()
    tree, sizes, rewards = figure.axes
    lived = list(out.widths)
    places = {(row, slot) for row, number in enumerate(lived) for slot in range(number)}
    small = widths[0] > 12
    if small:
        (dots,) = [artist for artist in tree.collections if len(artist.get_offsets())]
        assert {(row, slot) for slot, row in dots.get_offsets().astype(int).tolist()} == places
    else:
        assert {(round(text.get_position()[1]), text.get_position()[0]) for text in tree.texts} == places
    assert len(tree.lines) == sum(lived[1:])
    scores = [*out.scored[:, 0], out.rewards[0]]
    best = [float(row[:number].max()) for row, number in zip(scores, lived, strict=True)]
    assert rewards.lines[1].get_xdata().tolist() == best
    assert sizes.lines[0].get_xdata().tolist() == out.ess[:, 0].tolist()


def test_seeds_reproduce(flux):
    first, again = (flux.steer(num_particles=8, widths=WIDTHS, reward_scale=1.0) for _ in range(2))
    assert first == again


def test_calibrated(flux):
    """A calibration is of all particles to the end; a run that shrinks takes it."""
    steerer = flux.steerer(num_particles=8, widths=WIDTHS)
    with pytest.warns(UserWarning, match="calibrat"):
        calibration = steerer.calibrate(**flux.arguments())
    assert calibration.num_particles == 8
    out = steerer(**flux.arguments())
    assert out.widths == WIDTHS


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(), (4, 8), (8, 0), (8, -1), (8, 2.5), (8, True), 8, "84", (8, None), "8"])
@pytest.mark.parametrize("make", [Halving, lambda widths: FeynmanKac(widths=widths)])
def test_widths_are_whole_numbers_that_never_grow(make, widths):
    with pytest.raises(ValueError, match=r"^widths: expected whole numbers of at least 1, none larger .* got .*: list"):
        make(widths)


def test_widths_of_every_kind():
    for widths in ([8, 4], (8, 4), np.array([8, 4]), torch.tensor([8, 4]).tolist(), iter([8, 4])):
        assert Halving(widths) == Halving((8, 4))
    assert repr(Halving([8, 4])) == "Halving(widths=(8, 4))"
    assert repr(FeynmanKac(widths=[8, 4])) == "FeynmanKac(widths=(8, 4))"
    assert hash(Halving([8, 4])) == hash(Halving((8, 4)))


@pytest.mark.parametrize("strategy", [Halving((16, 8)), FeynmanKac(widths=(16, 8))])
def test_widths_begin_with_the_particles(flux, strategy):
    said = r"^widths: expected to begin with num_particles=8, got \(16, 8\): pass num_particles=16, or"
    with pytest.raises(ValueError, match=said):
        Steerer(flux.pipe, brightness, strategy)
    steerer = Steerer(flux.pipe, brightness, strategy, 16)
    steerer.num_particles = 8
    with pytest.raises(ValueError, match=said):
        steerer(**flux.arguments())
    flat = flux.steerer(num_particles=4)
    flat.widths = (16, 8)
    with pytest.raises(ValueError, match="^widths: expected to begin with num_particles=4"):
        flat(**flux.arguments())
    flat.num_particles = 16
    assert flat(**flux.arguments()).widths[-1] == 8


@pytest.mark.parametrize("strategy", [Halving(WIDTHS), FeynmanKac(widths=WIDTHS)])
@pytest.mark.parametrize(("transitions", "steps"), [(2, 6), (1, 6), (5, 2)])
def test_there_are_enough_transitions(flux, strategy, transitions, steps):
    """Said at the first step; a number of transitions is clipped to that of the steps."""
    seen = rows_seen(flux.network.x_embedder)
    steerer = Steerer(flux.pipe, brightness, strategy, 8, num_transitions=transitions)
    most = 1 if (strategy != Halving(WIDTHS) and steps == 2) else min(transitions, steps)
    with pytest.raises(ValueError, match=rf"^widths: expected at most {most}, one .* got 3, \(8, 4, 2\): take fewer"):
        steerer(**flux.arguments(num_inference_steps=steps))
    assert len(seen) == 1
    flux.run()


def test_what_lives_can_be_returned(flux):
    said = r"^num_images_per_prompt: expected 1 to 2, the last of widths=\(8, 4, 2\), got 3$"
    with pytest.raises(ValueError, match=said):
        flux.steer(num_particles=8, widths=WIDTHS, num_images_per_prompt=3)
    assert len(flux.steer(num_particles=8, widths=WIDTHS, num_images_per_prompt=1).images) == 1


@tiny.DIFFUSERS_42
@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("Flux2KleinKVPipeline", "keys and values of the reference image"),
        ("QwenImage21Pipeline", "keys and values of the prompt unless use_kv_cache=False"),
    ],
)
@pytest.mark.parametrize("announced", [True, False])
def test_networks_that_keep_state_are_refused(label, reason, announced):
    """At the start, or where the first rest, if nobody has said so before."""
    case = cases()[label]
    pipe, calls = case.build(), []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    given = arguments(case)
    prompt = given.pop("prompt", None)
    strategy = Halving((4, 2)) if announced else DropsTheWorst()
    steerer = Steerer(pipe, lambda z, _: z.flatten(1).mean(1), strategy, 4, num_transitions=2, decode="latents")
    said = rf"^widths: expected as many to the end for {label}, whose network keeps .* {reason}, got fewer: leave"
    with pytest.raises(ValueError, match=said):
        steerer(prompt, **given)
    assert bool(calls) != announced


def test_unknown_arguments_are_refused_at_once(flux):
    seen = rows_seen(flux.network.x_embedder)
    said = "^widths: FluxTransformer2DModel cannot be called .* got secret of .8, 3.: leave the option out$"
    with pytest.raises(ValueError, match=said):
        flux.steer(num_particles=8, widths=WIDTHS, joint_attention_kwargs={"secret": torch.zeros(8, 3)})
    assert not seen
    said = r"^particle_batch_size \(network of MicroBatches\): FluxTransformer2DModel cannot be called"
    with pytest.raises(ValueError, match=said):
        flux.steer(
            num_particles=8, widths=WIDTHS, particle_batch_size=2,
            joint_attention_kwargs={"secret": torch.zeros(8, 3)},
        )  # fmt: skip


@tiny.DIFFUSERS_42
def test_references_by_the_number_of_their_row_are_refused():
    case = cases()["OmniGenPipeline, from an image"]
    with pytest.raises(ValueError, match="^widths: .* expected no input_im.*, as it tells rows by their number"):
        steered(case, 4, None, widths=(4, 2))


def test_a_constant_width_asks_nothing_of_networks(flux):
    """What may not rest may be run with as many to the end; of this argument FLUX itself only warns."""
    assert flux.steer(widths=(4, 4), joint_attention_kwargs={"secret": torch.zeros(4, 3)}).widths == (4, 4, 4)
