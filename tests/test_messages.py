"""What is wrong is said before anything is drawn, with what was expected, what came, and what to do."""

import functools
import re

import numpy as np
import pytest
import torch

import tiny
from glassflows import BeamSearch, BestOfN, FeynmanKac, FeynmanKacSteerer, MicroBatches, Steerer


def nothing_runs(toy):
    """Make every network call of a toy an error."""

    def forward(*args, **kwargs):
        raise AssertionError("the pipeline was run")

    toy.network.forward = forward


# ---- rewards ---------------------------------------------------------------------------------------------------------


class PerPicture:
    def __call__(self, images):
        return [0.0] * len(images)


class Late:
    async def __call__(self, images, prompts):
        return [0.0] * len(images)


class Module(torch.nn.Module):
    def forward(self, images):
        return images.mean((1, 2, 3))


def of_one(images):
    return [0.0] * len(images)


async def late(images, prompts):
    return [0.0] * len(images)


def yielding(images, prompts):
    yield from [0.0] * len(images)


async def both(images, prompts):
    yield [0.0] * len(images)


REWARDS = {
    "a class": (PerPicture, "expected an object, got the class PerPicture: write PerPicture()"),
    "a function of one": (of_one, "expected a function of images and prompts, got one of (images)"),
    "a lambda of one": (lambda images: 0, "got one of (images)"),
    "a lambda of three": (lambda images, prompts, seed: 0, "missing a required argument: 'seed'"),
    "an object of one": (PerPicture(), "got one of (images)"),
    "a module of one": (Module(), "got one of (images)"),
    "a part of one": (functools.partial(of_one), "got one of (images)"),
    "an async function": (late, "returns one score per image, got one that is async or yields"),
    "an async object": (Late(), "got one that is async or yields"),
    "part of an async function": (functools.partial(late), "got one that is async or yields"),
    "a generator": (yielding, "got one that is async or yields"),
    "an async generator": (both, "got one that is async or yields"),
    "a text": ("clip", "expected a function of images and prompts, got str"),
}


@pytest.mark.parametrize("case", REWARDS)
def test_rewards_that_cannot_be_called(flux, case):
    """Refused where the steerer is made, and where the reward is set later."""
    reward, message = REWARDS[case]
    with pytest.raises(ValueError, match="^reward: .*" + re.escape(message)):
        flux.steerer(reward=reward)
    nothing_runs(flux)
    steerer = flux.steerer()
    steerer.reward = reward
    with pytest.raises(ValueError, match="^reward: .*" + re.escape(message)):
        steerer(**flux.arguments())


@pytest.mark.parametrize(
    "reward",
    [lambda images, prompts, scale=2: [scale] * len(images), lambda *args: [0.0] * len(args[0]), np.zeros_like, max,
     functools.partial(lambda scale, images, prompts: [scale] * len(images), 2.0), tiny.brightness],
    ids=["defaults", "any", "numpy's", "python's", "partial", "plain"],
)  # fmt: skip
def test_rewards_that_can_be_called(flux, reward):
    """Also those that do not tell."""
    flux.steerer(reward=reward)


def test_modules_may_be_rewards(flux):
    class Bright(torch.nn.Module):
        def forward(self, images, prompts):
            return 1000 * images.mean((1, 2, 3))

    assert flux.steer(reward=Bright()) == flux.steer(reward=Bright())


def coroutine(images, prompts):
    return late(images, prompts)


ANSWERS = {
    "a coroutine": (coroutine, "reward returned a coroutine; expected one score per particle"),
    "a generator": (lambda images, prompts: (0.0 for _ in images), "reward returned a generator; expected one score"),
    "a map": (lambda images, prompts: map(float, range(4)), "reward returned a map; expected one score per particle"),
    "a dictionary": (lambda images, prompts: {"score": [0.0] * 4}, "reward returned {'score': [0.0, 0.0, 0.0, 0.0]}"),
    "texts": (lambda images, prompts: ["good"] * 4, "reward returned ['good', 'good', 'good', 'good']; expected one"),
    "nothing at all": (lambda images, prompts: [None] * 4, "reward returned [None, None, None, None]; expected one"),
    "rows": (lambda images, prompts: [[1.0]] * 4, "reward returned shape (4, 1); expected one score per particle"),
    "one": (lambda images, prompts: 1.0, "reward returned shape (); expected one score per particle"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_answers_that_are_no_scores(flux, case):
    reward, message = ANSWERS[case]
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        flux.steer(reward=reward)


def test_scores_are_doubles(flux):
    """Numbers of Python's are as they are."""
    scores = [1e8, 1e8 + 1, 1e8 + 2, 1e39]
    out = flux.steer(reward=lambda images, prompts: scores, reward_scale=1e-39, ess_threshold=0)
    assert out.rewards.tolist() == [scores]


# ---- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", ["latent", "Latents", 3, True, False, ["latents"]])
def test_what_does_not_decode(flux, decode):
    message = f'^decode: expected None, "latents" or a function from latents to images, got {re.escape(repr(decode))}'
    with pytest.raises(ValueError, match=message):
        flux.steerer(decode=decode)
    nothing_runs(flux)
    steerer = flux.steerer()
    steerer.decode = decode
    with pytest.raises(ValueError, match=message):
        steerer(**flux.arguments())


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (
            lambda z: z[:1],
            r"decode returned shape \(1, 24, 16\); expected a tensor with a sample for each of 4 latents",
        ),
        (lambda z: [z], "decode returned list; expected a tensor"),
        (lambda z: None, "decode returned NoneType; expected a tensor"),
    ],
    ids=["one", "list", "none"],
)
def test_decoders_that_lose_samples(flux, decode, message):
    with pytest.raises(ValueError, match=message):
        flux.steer(decode=decode, reward=lambda images, prompts: [0.0] * len(images))


# ---- options ---------------------------------------------------------------------------------------------------------

NUMBERS = {
    "num_particles: expected a whole number of at least 1, got 4.0": {"num_particles": 4.0},
    "num_particles: expected a whole number of at least 1, got True": {"num_particles": True},
    "num_particles: expected a whole number of at least 1, got '4'": {"num_particles": "4"},
    "num_particles: expected at least 1, got -2": {"num_particles": -2},
    "particle_batch_size: expected a whole number of at least 1, or None for all at once, got 2.0": {
        "particle_batch_size": 2.0
    },
    "decode_batch_size: expected a whole number of at least 1, or None for all at once, got 'all'": {
        "decode_batch_size": "all"
    },
    "reward_batch_size: expected a whole number of at least 1, or None for all at once, got False": {
        "reward_batch_size": False
    },
    "score_every: expected a whole number of at least 1, got 1.5": {"score_every": 1.5},
    "ess_threshold: expected a fraction of num_particles in [0, 1], got '0.5'": {"ess_threshold": "0.5"},
    "start, stop: expected fractions 0 ≤ start ≤ stop ≤ 1, got 'half', 1.0": {"start": "half"},
    'reward_scale: expected a number, a list, a function or "auto", got []': {"reward_scale": []},
    'reward_scale: expected a number, a list, a function or "auto", got {}': {"reward_scale": {}},
    "reward_scale: expected a number, a list, a function or \"auto\", got ['a']": {"reward_scale": ["a"]},
}


@pytest.mark.parametrize("message", NUMBERS)
def test_options_that_are_no_numbers(flux, message):
    """Refused where the steerer is made, and when used if they were set later."""
    ((name, value),) = NUMBERS[message].items()
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        flux.steerer(**{name: value})
    nothing_runs(flux)
    steerer = flux.steerer()

    def use():
        setattr(steerer, name, value)
        steerer(**flux.arguments())

    with pytest.raises(ValueError, match="^" + re.escape(message)):
        use()


def test_whole_numbers_of_numpy_are_whole(flux):
    out = flux.steer(num_particles=np.int64(4), decode_batch_size=np.int32(2), num_images_per_prompt=np.int64(2))
    assert out == flux.steer(num_particles=4, decode_batch_size=2, num_images_per_prompt=2)


STRATEGIES = {
    "a class": (FeynmanKac, "expected an object, got the class FeynmanKac: write FeynmanKac()"),
    "a number": (8, "expected a strategy such as FeynmanKac(), got 8: pass num_particles after it, or by name"),
    "a half": (type("Half", (), {"due": lambda self, at: True})(), "without init, step, finish: see Strategy"),
}


@pytest.mark.parametrize("case", STRATEGIES)
def test_what_is_no_strategy(flux, case):
    strategy, message = STRATEGIES[case]
    with pytest.raises(ValueError, match="^strategy: .*" + re.escape(message)):
        Steerer(flux.pipe, tiny.brightness, strategy)
    steerer = flux.steerer()
    steerer.strategy = strategy
    with pytest.raises(ValueError, match="^strategy: .*" + re.escape(message)):
        steerer(**flux.arguments())


@pytest.mark.parametrize("batches", [4, {"network": 4}, MicroBatches])
def test_batches_that_are_none(flux, batches):
    with pytest.raises(ValueError, match="^batches: expected MicroBatches"):
        Steerer(flux.pipe, tiny.brightness, batches=batches)


def test_options_of_strategies():
    for width in (2.0, "2", True):
        with pytest.raises(ValueError, match="width: expected a whole number of at least 1"):
            BeamSearch(width=width)
    for scale in ("auto", [1.0], float("inf")):
        with pytest.raises(ValueError, match="reward_scale: expected a finite number"):
            BestOfN(reward_scale=scale)


# ---- arguments of a call ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [{"num_particles": 4}, {"num_transitions": 2}, {"reward_scale": 2.0}, {"particle_batch_size": 1},
     {"ess_threshold": 0.5}, {"decode": "latents"}, {"previews": True}],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_options_given_to_the_call(flux, given):
    nothing_runs(flux)
    (name,) = given
    with pytest.raises(TypeError, match=f"^{name} belongs to the constructor: .*FeynmanKacSteerer"):
        flux.steerer()(**flux.arguments(), **given)


def test_arguments_of_the_pipelines_own(flux):
    """An argument that the pipeline takes is the pipeline's, whatever the steerer calls its options."""

    class Start(type(flux.pipe)):
        def __call__(self, *args, start=0.0, num_images_per_prompt=1, **kwargs):
            assert start == 0.5
            return super().__call__(*args, num_images_per_prompt=num_images_per_prompt, **kwargs)

    pipe = Start(**flux.pipe.components)
    FeynmanKacSteerer(pipe, tiny.brightness, 2, num_transitions=2)(**flux.arguments("a cat"), start=0.5)


PROMPTS = {
    "a number": 3,
    "none at all": [],
    "no text": ["a cat", 3],
    "an array": np.array(["a cat", "a dog"]),
    "bytes": b"a cat",
    "a generator": (text for text in ["a cat"]),
    "a dictionary": {"a cat": 1},
    "nothing in a list": [None],
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_that_are_no_texts(flux, case):
    nothing_runs(flux)
    with pytest.raises(ValueError, match="^prompt: expected a text, or a list of texts and at least one, got"):
        flux.steerer()(PROMPTS[case], num_inference_steps=2, **tiny.FLUX_CALL)


@pytest.mark.parametrize(
    "generator", [0, 17, np.random.default_rng(0), [0, 1], [], (tiny.seeded(),), [tiny.seeded(), None]],
    ids=["zero", "seed", "numpy's", "seeds", "empty", "tuple", "none among"],
)  # fmt: skip
def test_seeds_given_for_generators(flux, generator):
    nothing_runs(flux)
    with pytest.raises(ValueError, match="^generator: expected a torch.Generator.*manual_seed"):
        flux.steerer()(**flux.arguments(generator=generator))


@pytest.mark.parametrize("number", [2.0, "2", True])
def test_numbers_of_images(flux, number):
    with pytest.raises(ValueError, match="num_images_per_prompt: expected 1 to num_particles=4, got"):
        flux.steer(num_images_per_prompt=number)


# ---- out of memory ---------------------------------------------------------------------------------------------------


def fail(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("where", ["text encoder", "callback"])
def test_out_of_memory_elsewhere_blames_no_batch_size(flux, where):
    given = {}
    if where == "callback":
        given["callback_on_step_end"] = fail
    else:
        flux.pipe.text_encoder.forward = fail
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\.$"):
        flux.steer(**given)


@pytest.mark.parametrize("size", [None, 2])
def test_out_of_memory_in_the_network_blames_its_own(toy, size):
    toy.network.forward = fail
    with pytest.raises(torch.OutOfMemoryError, match=r"lower particle_batch_size of FeynmanKacSteerer"):
        toy.steer(particle_batch_size=size)


# ---- models of rewards -----------------------------------------------------------------------------------------------


def test_rewards_are_read_before_the_run(flux):
    """So that a file that is missing is told at once."""

    class Missing:
        def load(self):
            raise OSError("not found")

        def __call__(self, images, prompts):
            return [0.0] * len(images)

    steerer = flux.steerer(reward=Missing())  # nothing is read yet
    nothing_runs(flux)
    with pytest.raises(OSError, match="not found"):
        steerer(**flux.arguments())


@pytest.mark.parametrize("load", [lambda path: 1 / 0, 3], ids=["of something else", "no method"])
def test_other_loads_are_left_alone(flux, load):
    class Other:
        def __call__(self, images, prompts):
            return [0.0] * len(images)

    reward = Other()
    reward.load = load
    flux.steer(reward=reward)


def test_a_reward_is_read_once_for_each_call(flux):
    told = []

    class Reward:
        def load(self):
            told.append("load")

        def __call__(self, images, prompts):
            told.append("score")
            return [0.0] * len(images)

    flux.steer(reward=Reward())
    assert told == ["load", "score", "score", "score"]


# ---- the scheduler of the user's own ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["well", "raises"])
def test_a_users_hook_survives(flux, ends):
    """It is not called in a steered run, which has a hook of its own, and stays on the scheduler."""
    from glassflows.scheduler import TransitionHook

    class Mine(TransitionHook):
        def __init__(self):
            self.boundaries = 0

        def at_boundary(self, at, x_t, z):
            self.boundaries += 1

    mine, seen = Mine(), []
    scheduler = flux.glass(3).pipe.scheduler
    scheduler.hook, scheduler.on_boundary = mine, lambda at, x_t, z: seen.append(at.index)
    if ends == "well":
        flux.steer(num_transitions=None)
        assert seen == [0, 1, 2]
    else:
        with pytest.raises(ZeroDivisionError):
            flux.steer(reward=lambda images, prompts: 1 / 0)
    assert flux.pipe.scheduler is scheduler
    assert scheduler.hook is mine
    assert mine.boundaries == 0
    flux.run()
    assert mine.boundaries == 3
