"""Several processes that share the particles of a call: as one process alone, and ended together."""

import logging
import os
import signal
import threading
import time
import uuid
from datetime import timedelta
from queue import Empty

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

pytest.importorskip("diffusers", minversion="0.42")  # older ones build other pipelines

import scenes
import tiny
from glassflows import BeamSearch, FeynmanKacSteerer, Halving, Ledger, MicroBatches, Steerer, Twist
from glassflows.host import team
from glassflows.host.run import PipelineRun
from glassflows.host.team import ALONE, Team, team_of
from glassflows.rewards import Ranked
from test_microbatch import PIPELINES
from zoo.survey import arguments, cases

PROMPTS = ["a cat", "a dog"]
VARIANTS = [
    {},
    {"twist": 1.0, "ess_threshold": 1.0},
    {"look_ahead": 1, "look_ahead_samples": 2, "previews": True},
    {"widths": (5, 3, 1), "num_transitions": 3},
    {"num_transitions": 6, "particle_batch_size": 1, "decode_batch_size": 2, "reward_batch_size": 1},
]


def level(samples, prompts):
    return 100 * samples.flatten(1).mean(1)


def redness(samples, prompts):
    return samples[:, 0].mean((1, 2))


def member(rank, size, path, works, results):
    """Be one of several processes: put what each work returns or raises, and the seconds that it took."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    for work in works:
        start = time.monotonic()
        try:
            out = work(rank)
        except BaseException as error:
            out = f"{type(error).__name__}: {error}"
        results.put((work.__name__, rank, out, time.monotonic() - start))


def on(size, works, folder, dead=0, seconds=400):
    """Run some works on several processes, some of which die in the last.

    Returns:
        For each work by name what it returns, and the seconds that it took, by rank.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # so that what takes seconds is imported once
    results, path = context.Queue(), folder / uuid.uuid4().hex
    processes = [context.Process(target=member, args=(rank, size, path, works, results)) for rank in range(size)]
    for process in processes:
        process.start()
    told = {work.__name__: {} for work in works}
    try:
        for _ in range(len(works) * size - dead):
            name, rank, out, taken = results.get(timeout=seconds)
            told[name][rank] = out, taken
    except Empty:
        pytest.fail(f"processes hung for {seconds} s, after {told}")
    finally:
        for process in processes:
            process.kill()
            process.join()
    return told


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return on(
        2,
        [steer_all, steer_scenes, steer_offloaded, draw_from_defaults, steer_within, fail_in_turn, come_late],
        tmp_path_factory.mktemp("two"),
    )


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Four processes, of which one dies in the end."""
    return on(4, [steer_some, steer_scenes, share_two_particles, die], tmp_path_factory.mktemp("four"), dead=1)


def raised(work):
    """Return what some work raises, as a string."""
    try:
        work()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# ---- as one process --------------------------------------------------------------------------------------------------


def alike(steerer, **call):
    """Compare a call that processes share with that of one process."""
    both = []
    for distributed in (False, "auto"):
        steerer.distributed = distributed
        both.append(steerer(**{**call, "generator": tiny.seeded()}))
    alone, shared = both
    assert torch.equal(shared.ancestors, alone.ancestors)
    torch.testing.assert_close(shared.rewards, alone.rewards, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(shared.log_weights, alone.log_weights, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(shared.images, alone.images, atol=5e-5)
    torch.testing.assert_close(shared.latents, alone.latents, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(shared.log_evidence, alone.log_evidence, rtol=1e-4, atol=1e-2, equal_nan=True)
    assert shared.parts.keys() == alone.parts.keys()
    for name, part in shared.parts.items():
        torch.testing.assert_close(part, alone.parts[name], rtol=1e-4, atol=1e-3, equal_nan=True)
    assert shared.ledger == alone.ledger
    assert shared.ledger.received > alone.ledger.received == 0
    assert (shared.previews is None) == (alone.previews is None)
    if alone.previews is not None:
        assert (shared.previews.int() - alone.previews.int()).abs().max() <= 1


def steer_all(rank):
    """Every option on two families, and other strategies; then pipelines that lay out their rows in other ways."""
    for make in (tiny.flux, tiny.sd):
        toy = tiny.Toy(make)
        for options in VARIANTS:
            alike(toy.steerer(reward=level, num_particles=5, reward_scale=1.0, **options), **toy.arguments(PROMPTS))
    for strategy in (BeamSearch(2), Halving(widths=(4, 2))):
        toy = tiny.Toy(tiny.flux)
        alike(Steerer(toy.pipe, level, strategy, 4, num_transitions=3), **toy.arguments(PROMPTS))
    alike(tiny.Toy(tiny.sd).steerer(reward=Ranked(level, redness), num_particles=5), **toy.arguments(PROMPTS))
    for label in ("FluxControlNetPipeline", "DiTPipeline", "ZImagePipeline", "WanPipeline, two experts"):
        steer_pipeline(label)
    return "alike"


def steer_pipeline(label):
    case = cases()[label]
    toy = tiny.Toy(case.build, {name: one for name, one in arguments(case).items() if name != "generator"})
    alike(toy.steerer(reward=level, num_particles=3, reward_scale=1.0), **toy.arguments(num_inference_steps=4))


def steer_scenes(rank):
    """The trained model, twisted, with a reward of its images."""
    pipe = scenes.load_pipeline()
    steerer = FeynmanKacSteerer(pipe, scenes.load_reward(), 5, num_transitions=3, twist=0.5)
    alike(steerer, prompt="a red circle", num_inference_steps=6, output_type="np", **scenes.CALL)
    return "alike"


def steer_offloaded(rank):
    """Networks and decoders that are away where they are not at work."""
    for offload in (
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: pipe.enable_group_offload("cpu", offload_type="leaf_level"),
    ):
        toy = tiny.Toy(tiny.flux)
        offload(toy.pipe)
        alike(toy.steerer(reward=level, num_particles=5, twist=1.0, reward_scale=1.0), **toy.arguments(PROMPTS))
    return "alike"


def steer_some(rank):
    toy = tiny.Toy(tiny.flux)
    for options in VARIANTS[:2]:
        alike(toy.steerer(reward=level, num_particles=5, reward_scale=1.0, **options), **toy.arguments(PROMPTS))
    return "alike"


@pytest.mark.slow
@pytest.mark.parametrize("work", ["steer_all", "steer_scenes", "steer_offloaded"])
def test_two_processes_are_as_one(two, work):
    assert [out for out, _ in two[work].values()] == ["alike"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("work", ["steer_some", "steer_scenes"])
def test_four_processes_are_as_one(four, work):
    assert [out for out, _ in four[work].values()] == ["alike"] * 4


def steer_pipelines(rank):
    for label in PIPELINES:
        steer_pipeline(label)
    return "alike"


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_three_processes_are_as_one_on_every_kind_of_pipeline(tmp_path):
    told = on(3, [steer_pipelines, steer_all, steer_scenes, steer_offloaded], tmp_path)
    assert {work: [out for out, _ in outs.values()] for work, outs in told.items()} == dict.fromkeys(
        told, ["alike"] * 3
    )


def share_two_particles(rank):
    """Two particles, of which one lives in the end; return how often the network is called, alone and shared."""
    toy, calls = tiny.Toy(tiny.flux), []
    toy.network.pos_embed.register_forward_pre_hook(lambda module, args: calls.append(1))
    alike(toy.steerer(reward=level, num_particles=2, reward_scale=1.0, widths=(2, 1)), **toy.arguments("a cat"))
    return len(calls)


@pytest.mark.slow
def test_more_processes_than_particles(four):
    """Alone a process makes 6 calls; shared, two make those of a particle each, and one of them goes on."""
    calls = sorted(out for out, _ in four["share_two_particles"].values())
    assert calls[0] == calls[1] == 6
    assert 6 < calls[2] < calls[3] == 12


def draw_from_defaults(rank):
    toy = tiny.Toy(tiny.flux)  # which seeds what its weights are drawn from
    torch.manual_seed(rank)
    out = toy.steerer(reward=level)(**toy.arguments(generator=None))
    return out.rewards.tolist(), out.latents.tolist(), float(torch.rand(()))


@pytest.mark.slow
def test_what_no_generator_is_given_for_is_drawn_as_the_first_process_draws_it(two):
    (one, _), (other, _) = two["draw_from_defaults"].values()
    assert isinstance(one, tuple), one
    assert one == other


# ---- ended together --------------------------------------------------------------------------------------------------


def fail_in_turn(rank):
    """What each process is told of the faults of one, and that pipeline and processes go on afterwards."""
    toy, told = tiny.Toy(tiny.flux), []
    native = toy.pipe.scheduler

    def of_second(error):
        def reward(images, prompts):
            if rank == 1:
                raise error
            return level(images, prompts)

        return reward

    def call(reward=level, prompt=PROMPTS, steerer=None, **given):
        steerer = steerer or toy.steerer(reward=reward, num_particles=4)
        return raised(lambda: steerer(**toy.arguments(prompt, **given)))

    told.append(call(of_second(ZeroDivisionError("by zero"))))
    told.append(call(of_second(KeyboardInterrupt())))
    told.append(call(of_second(torch.OutOfMemoryError("no memory"))))
    decode = torch.linalg.inv if rank else (lambda z: torch.rand(len(z), 3, 4, 4))  # z is not square
    told.append(call(steerer=toy.steerer(reward=level, decode=decode)))
    told.append(call(prompt=PROMPTS[: 1 + rank]))
    told.append(call(seed=rank))
    told.append(call(steerer=toy.steerer(num_particles=4 + rank)))
    told.append(call(latents=toy.latents(8, seed=rank)))

    def stop(pipe, i, t, kwargs):
        pipe._interrupt = rank == 1 and i == 2
        return kwargs

    told.append(call(callback_on_step_end=stop))
    told.append(call(lambda images, prompts: level(images, prompts)[: 0 if rank else None]))
    told.append(call(unknown=1) if rank else call())
    told.append(call(steerer=toy.steerer(twist=Twist(1.0 + rank))))
    told.append(call(lambda images, prompts: pressed(rank) or level(images, prompts)))
    told.append(raised(lambda: toy.steerer(reward=Unread(rank)).calibrate(**toy.arguments(PROMPTS))))
    assert toy.pipe.scheduler is native
    assert "forward" not in vars(toy.network)
    alike(toy.steerer(reward=level), **toy.arguments(PROMPTS))
    return told


class Unread:
    """A reward whose model is missing on the second process."""

    def __init__(self, rank):
        self.rank = rank

    def load(self):
        if self.rank == 1:
            raise OSError("no such file")

    def __call__(self, images, prompts):
        return level(images, prompts)


def pressed(rank):
    """Press Ctrl-C in the second process while it waits for the first."""
    if rank == 0:
        time.sleep(1.5)
    else:
        threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT)).start()


@pytest.mark.slow
def test_a_fault_of_one_ends_the_call_of_all(two):
    (first, _), (second, _) = two["fail_in_turn"][0], two["fail_in_turn"][1]
    assert isinstance(first, list), first
    failed = "ProcessFailed: distributed: process 1 failed: "
    raised_there = (
        "ZeroDivisionError: by zero",
        "KeyboardInterrupt: ",
        "MicroBatchTooLarge: no memory (lower reward_batch_size of FeynmanKacSteerer",
        "RuntimeError: linalg.inv",
    )
    for i, message in enumerate(raised_there):
        assert second[i].startswith(message)
        assert first[i].startswith(failed)
        assert message.split(":")[1].split("(")[0] in first[i]
    for told in (first, second):
        for message, name in zip(told[4:8], ("prompt", "generator", "num_particles", "latents"), strict=True):
            assert message.startswith("ValueError: distributed: expected the same call on all 2 processes"), message
            assert name in message
        assert told[8].startswith("ProcessFailed: distributed: expected all processes at "), told[8]
    assert second[9].startswith("ValueError: reward returned shape (0,)")
    assert first[9].startswith(f"{failed}ValueError: reward returned shape (0,)")
    assert "got another on process 1 than on 0: unknown. Make" in first[10]
    assert all("got another on process" in told[11] and "twist" in told[11] for told in (first, second))
    assert second[12].startswith("KeyboardInterrupt")
    assert first[12].startswith(f"{failed}KeyboardInterrupt")
    assert second[13] == "OSError: no such file"
    assert first[13].startswith(f"{failed}OSError: no such file")
    assert max(seconds for _, seconds in two["fail_in_turn"].values()) < 100


def come_late(rank):
    """Return what a process says while it waits for another to make its call."""
    toy, said = tiny.Toy(tiny.flux), []
    logger = logging.getLogger(team.__name__)
    logger.addFilter(lambda record: said.append(record.getMessage()))
    team.PATIENCE = timedelta(seconds=0.3)
    if rank == 1:
        time.sleep(1.5)
    toy.steerer(reward=level)(**toy.arguments(PROMPTS))
    return said


@pytest.mark.slow
def test_a_process_says_that_it_waits_for_others_to_begin(two):
    (first, _), (second, _) = two["come_late"][0], two["come_late"][1]
    assert len(first) == 1
    assert "for 0.3 s for others" in first[0]
    assert second == []


def die(rank):
    toy = tiny.Toy(tiny.flux)

    def reward(images, prompts):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return level(images, prompts)

    start = time.monotonic()
    return raised(lambda: toy.steerer(reward=reward)(**toy.arguments(PROMPTS))), time.monotonic() - start


@pytest.mark.slow
def test_a_process_that_is_killed_is_missed_at_once(four):
    assert sorted(four["die"]) == [0, 2, 3]
    for (message, seconds), _ in four["die"].values():
        assert message.startswith("ProcessFailed: distributed: another process"), message
        assert seconds < 30


def steer_within(rank):
    """A reward that itself steers does so by itself."""
    toy, inner = tiny.Toy(tiny.flux), tiny.Toy(tiny.sd)

    def reward(images, prompts):
        inside = inner.steerer(reward=level, num_particles=2)(**inner.arguments(num_inference_steps=2))
        return level(images, prompts) + inside.rewards.mean()

    # of three particles one process scores one, and the other two, one after the other
    return toy.steerer(reward=reward, num_particles=3, reward_batch_size=1)(**toy.arguments()).rewards.tolist()


@pytest.mark.slow
def test_what_a_reward_runs_is_its_own_process_s(two):
    (one, _), (other, _) = two["steer_within"].values()
    assert isinstance(one, list), one
    assert one == other


# ---- one process alone -----------------------------------------------------------------------------------------------


def test_without_a_process_group_a_process_is_alone():
    assert team_of("auto") is team_of(False) is ALONE
    with pytest.raises(ValueError, match="^distributed: expected an initialised process group, got none: start"):
        team_of(True)
    with pytest.raises(ValueError, match="^distributed: expected \"auto\", True or False, got 'yes'$"):
        team_of("yes")
    assert ALONE.meet("somewhere", lambda: 3) == [3]


@pytest.mark.parametrize(("number", "size"), [(8, 3), (2, 4), (1, 2), (0, 2), (7, 7)])
def test_shares_are_even_and_whole(number, size):
    team = Team()
    team.size = size
    shares = [range(number)[team.share(number, rank)] for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(number))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_network_that_shares_samples_is_refused(flux):
    team = Team()
    team.size = 2
    flux.network._parallel_config = object()
    with pytest.raises(ValueError, match="^distributed: expected False for FluxPipeline, whose FluxTransformer2DModel"):
        PipelineRun(flux.pipe, flux.arguments("a cat"), 4, MicroBatches(), Ledger(), team=team)


def test_a_steerer_says_whether_it_shares(flux):
    assert FeynmanKacSteerer(flux.pipe, level).distributed == "auto"
    assert flux.steerer(distributed=False).distributed is False
