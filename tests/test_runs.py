"""Runs of pipelines side by side: each is as if alone, or refused at its start, and nothing is left behind."""

import copy
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline

import tiny
from glassflows import FeynmanKacSteerer, GLASSScheduler, MicroBatches, Steerer
from glassflows.host.patch import current, replaced

CALL = tiny.FLUX_CALL | {"num_inference_steps": 6, "output_type": "np"}
UNDER_WAY = "a steered call of this pipeline is under way.*give each call a pipeline of its own"


def brightness(images, prompts):
    return 1000 * images.mean((1, 2, 3))


def steer(pipe, reward=brightness, seed=0, **options):
    options = {"num_transitions": 3, "reward_scale": 1.0, "particle_batch_size": 2} | options
    return FeynmanKacSteerer(pipe, reward, 4, start=0.0, **options)("a cat", generator=tiny.seeded(seed), **CALL)


def plain(pipe, seed=0):
    return pipe("a cat", generator=tiny.seeded(seed), **CALL).images


def close(ours, alone):
    """Check for equality but for rounding: in another thread memory may lie otherwise, and sums with it."""
    if isinstance(ours, Exception):
        raise ours
    np.testing.assert_allclose(ours, alone, rtol=0, atol=1e-5)


def flux():
    """Return a pipeline whose tokenizer threads may share.

    A fast one keeps how it pads from call to call, and FLUX asks for several ways: threads that share it meet.
    """
    pipe, lock = tiny.flux(), threading.RLock()

    class Locked(type(pipe.tokenizer_2)):
        def __call__(self, *args, **kwargs):
            with lock:
                return super().__call__(*args, **kwargs)

        def tokenize(self, *args, **kwargs):
            with lock:
                return super().tokenize(*args, **kwargs)

    pipe.tokenizer_2.__class__ = Locked
    return pipe


def sharing(pipe, cls=FluxPipeline):
    """Return another pipeline around the same components."""
    other = cls(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return other


class Untouched:
    """Checks that a pipeline is left as it was, and draws what it drew."""

    def __init__(self, pipe):
        self.pipe = pipe
        self.expected = plain(pipe)
        self.before = self.state()

    def state(self):
        owners = {"pipe": self.pipe, **self.pipe.components}
        methods = ("forward", "decode", "check_inputs", "progress_bar", "prepare_latents")
        patched = {(name, method) for name, owner in owners.items() for method in methods
                   if owner is not None and method in vars(owner)}  # fmt: skip
        return self.pipe.scheduler, dict(self.pipe.config), set(vars(self.pipe)), patched

    def check(self):
        assert self.state() == self.before
        assert getattr(self.pipe.scheduler, "hook", None) is None
        assert np.array_equal(plain(self.pipe), self.expected)


class Interleaved:
    """Runs functions in threads, and lets each pass named points in a given order."""

    def __init__(self, order):
        self.order = list(order)
        self.turn = threading.Condition()
        self.results = {}

    def at(self, point):
        """Wait for the turn of a point, and give it to the next."""
        with self.turn:
            assert self.turn.wait_for(lambda: self.order[0] == point, timeout=60), f"never came to {point}"
            self.order.pop(0)
            self.turn.notify_all()

    def run(self, **functions):
        def keeping(name, function):
            try:
                self.results[name] = function()
            except Exception as error:
                self.results[name] = error

        threads = [threading.Thread(target=keeping, args=pair) for pair in functions.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        return self.results


def passing(order, *points):
    """Return a reward that passes one point at each scoring."""
    left = list(points)

    def reward(images, prompts):
        if left:
            order.at(left.pop(0))
        return brightness(images, prompts)

    return reward


@pytest.mark.parametrize(
    "points",
    [["a1", "b1", "b2", "b3", "b ends", "a2", "a3", "a ends"], ["a1", "b1", "a2", "a3", "a ends", "b2", "b3", "b ends"],
     ["a1", "b1", "a2", "b2", "b3", "b ends", "a3", "a ends"]],
    ids=["nested", "first ends first", "in turns"],
)  # fmt: skip
def test_pipelines_that_share_networks(points):
    """In any interleaving each draws what it draws alone, and leaves the networks as they were."""
    one = flux()
    two = sharing(one)
    expected = steer(one, seed=1).images, steer(two, seed=2).images
    guards = [Untouched(one), Untouched(two)]
    order = Interleaved(points)

    def run(name, pipe, seed):
        out = steer(pipe, passing(order, *(f"{name}{i}" for i in (1, 2, 3))), seed)
        order.at(f"{name} ends")
        return out.images

    results = order.run(a=lambda: run("a", one, 1), b=lambda: run("b", two, 2))
    close(results["a"], expected[0])
    close(results["b"], expected[1])
    for guard in guards:
        guard.check()


def test_a_second_steered_call_of_a_pipeline_is_refused():
    """It changes nothing about the first one, which goes on to its end."""
    pipe = flux()
    expected, guard = steer(pipe).images, Untouched(pipe)
    order = Interleaved(["a1", "b ends", "a2", "a3"])
    generator = tiny.seeded(5)

    def second():
        try:
            return FeynmanKacSteerer(pipe, brightness, 4)("a cat", generator=[generator], **CALL)
        finally:
            order.at("b ends")

    first = passing(order, "a1", "a2", "a3")
    started = threading.Event()
    results = order.run(
        a=lambda: steer(pipe, lambda images, prompts: (first(images, prompts), started.set())[0]),
        b=lambda: started.wait(60) and second(),
    )
    close(results["a"].images, expected)
    with pytest.raises(RuntimeError, match=UNDER_WAY):
        raise results["b"]
    assert torch.equal(generator.get_state(), tiny.seeded(5).get_state())  # nothing was drawn for it
    guard.check()


def test_a_plain_call_beside_a_steered_one_is_refused():
    pipe = flux()
    expected, guard = steer(pipe).images, Untouched(pipe)
    caught = []

    def reward(images, prompts):
        def call():
            try:
                plain(pipe)
            except RuntimeError as error:
                caught.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join(60)
        return brightness(images, prompts)

    assert np.array_equal(steer(pipe, reward).images, expected)
    assert len(caught) == 2  # the final scoring is after the run
    with pytest.raises(RuntimeError, match=UNDER_WAY):
        raise caught[0]
    guard.check()


@pytest.mark.parametrize("make", [tiny.flux, tiny.sd])
@pytest.mark.parametrize("how", ["plain", "steered"])
def test_a_reward_that_calls_the_same_pipeline(make, how):
    pipe = make()
    call = (tiny.FLUX_CALL if make is tiny.flux else tiny.SD_CALL) | {"num_inference_steps": 4, "output_type": "np"}

    def reward(images, prompts):
        if how == "plain":
            return pipe("a dog", **call).images.mean((1, 2, 3))
        return FeynmanKacSteerer(pipe, brightness, 2)("a dog", **call).rewards.flatten()

    before = pipe("a cat", generator=tiny.seeded(), **call).images
    with pytest.raises(RuntimeError, match=UNDER_WAY):
        FeynmanKacSteerer(pipe, reward, 2, num_transitions=2)("a cat", **call)
    assert not isinstance(pipe.scheduler, GLASSScheduler)
    assert np.array_equal(pipe("a cat", generator=tiny.seeded(), **call).images, before)


def test_a_callback_that_calls_the_same_pipeline_is_refused():
    pipe = flux()
    guard = Untouched(pipe)
    steerer = FeynmanKacSteerer(pipe, brightness, 2, num_transitions=2)
    with pytest.raises(RuntimeError, match=UNDER_WAY):
        steerer("a cat", callback_on_step_end=lambda *args: plain(pipe) and {}, **CALL)
    guard.check()


@pytest.mark.parametrize("how", ["plain", "steered"])
def test_a_reward_may_call_a_pipeline_of_its_own(how):
    """Also one around the same networks, and one made while the run is on, whose scheduler has no hook afterwards."""
    pipe = flux()
    other = sharing(pipe)
    expected = steer(pipe).images
    want = steer(other, seed=3).images if how == "steered" else plain(other, 3)
    inner, made = [], []

    def reward(images, prompts):
        inner.append(steer(other, seed=3).images if how == "steered" else plain(other, 3))
        made.append(sharing(pipe))
        return brightness(images, prompts)

    assert np.array_equal(steer(pipe, reward).images, expected)
    assert all(np.array_equal(images, want) for images in inner)
    assert len(inner) == 3
    assert all(getattr(one.scheduler, "hook", None) is None for one in made)
    assert plain(made[0]).shape == (1, 16, 24, 3)


@pytest.mark.slow
def test_ten_threads_around_the_same_networks():
    """Each with a pipeline of its own: results as alone. With one pipeline: one runs, the others are refused."""
    pipe = flux()
    guard = Untouched(pipe)
    pipes = [sharing(pipe) for _ in range(10)]
    expected = [steer(one, seed=i).images for i, one in enumerate(pipes)]
    together = threading.Barrier(10)

    def run(i, one):
        together.wait(60)
        return steer(one, seed=i).images

    results = Interleaved([]).run(**{f"t{i}": (lambda i=i, one=one: run(i, one)) for i, one in enumerate(pipes)})
    for i, images in enumerate(expected):
        close(results[f"t{i}"], images)
    results = Interleaved([]).run(**{f"t{i}": (lambda i=i: run(i, pipe)) for i in range(10)})
    drawn = {i: results[f"t{i}"] for i in range(10) if isinstance(results[f"t{i}"], np.ndarray)}
    refused = [one for one in results.values() if isinstance(one, RuntimeError)]
    assert len(drawn) >= 1
    assert len(drawn) + len(refused) == 10
    for i, images in drawn.items():
        close(images, expected[i])
    guard.check()


def test_image_to_image_beside_text_to_image():
    text = flux()
    image = sharing(text, FluxImg2ImgPipeline)
    given = {"image": torch.rand(1, 3, 16, 24, generator=tiny.seeded(3)), "strength": 0.7}

    def from_image():
        steerer = FeynmanKacSteerer(image, brightness, 3, num_transitions=2, particle_batch_size=2)
        return steerer("a cat", generator=tiny.seeded(1), **given, **CALL).images

    expected, inner = (steer(text).images, from_image()), []

    def reward(images, prompts):
        inner.append(from_image())
        return brightness(images, prompts)

    assert np.array_equal(steer(text, reward).images, expected[0])
    assert all(np.array_equal(images, expected[1]) for images in inner)


def test_a_scheduler_the_user_sets_within_a_run_stays():
    pipe, mine = flux(), flux().scheduler

    def setting(images, prompts):
        pipe.scheduler = mine
        return brightness(images, prompts)

    with pytest.raises(IndexError, match="out of bounds"):  # the user's own: it was told no timesteps
        steer(pipe, setting)
    assert pipe.scheduler is mine


def test_a_network_copied_within_a_run_is_a_network_of_its_own():
    """A deep copy runs its own weights, with nothing of the run about it."""
    pipe, copies = flux(), []

    def copying(pipe, i, t, tensors):
        if not copies:
            copies.append(copy.deepcopy(pipe.transformer))
        return tensors

    steerer = FeynmanKacSteerer(pipe, brightness, 4, num_transitions=2, particle_batch_size=2)
    steerer("a cat", generator=tiny.seeded(), callback_on_step_end=copying, **CALL)
    network = copies[0]
    expected = plain(pipe)
    pipe.transformer = network
    assert np.array_equal(plain(pipe), expected)
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
    assert not np.array_equal(plain(pipe), expected)


def test_calls_keep_no_tensors():
    """Without the collector: a call's latents, population and scheduler are gone with its result."""
    pipe, kept = flux(), []

    def reward(images, prompts):
        kept.append(weakref.ref(images))
        if isinstance(pipe.scheduler, GLASSScheduler):  # not at the end
            hook = pipe.scheduler.hook
            kept.extend(map(weakref.ref, (pipe.scheduler, hook, hook.inner, hook.inner.scorer)))
        return brightness(images, prompts)

    steerer = Steerer(pipe, reward, num_particles=4, num_transitions=3, batches=MicroBatches(network=2))
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            result = steerer("a cat", generator=tiny.seeded(), **CALL)
            del result
        assert [one() for one in kept if one() is not None] == []
    finally:
        gc.enable()


def test_stand_ins_go_in_any_order():
    class Owner:
        def method(self, x):
            """What it says."""
            return x

    owner = Owner()
    one, two = (
        replaced(owner, "method", "a", lambda method: lambda x: method(x) + 1),
        replaced(owner, "method", "b", lambda method: lambda x: method(x) + 10),
    )
    one.__enter__()
    two.__enter__()
    assert owner.method(0) == 0
    for run, value in (("a", 1), ("b", 10), ("c", 0), (None, 0)):
        with current(run):
            assert owner.method(0) == value
    assert owner.method.__doc__ == "What it says."
    one.__exit__(None, None, None)
    with current("a"):
        assert owner.method(0) == 0
    with current("b"):
        assert owner.method(0) == 10
    two.__exit__(None, None, None)
    assert vars(owner) == {}
