"""What diffusers asks of every scheduler class, asked of ours around every native class it supports."""

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UnCLIPScheduler

import tiny
from glassflows import GLASSFlowMatchScheduler, GLASSScheduler
from glassflows.scheduler import supported

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONFIGS = {
    **{name: {"shift": 3.0} for name in supported.FLOW},
    "HeliosScheduler": {"stages": 1},
    "UnCLIPScheduler": {"variance_type": "learned_range"},
    "PNDMScheduler": {**SD, "skip_prk_steps": True},
    "DDIMScheduler": tiny.SD_SCHEDULER,
    "EDMDPMSolverMultistepScheduler": {"sigma_schedule": "exponential"},
    "CosineDPMSolverMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {**SD, "solver_order": 3},
    "UniPCMultistepScheduler": {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
}
OURS = (GLASSScheduler, GLASSFlowMatchScheduler)


class Case(NamedTuple):
    """One of our classes around a native one."""

    cls: type[GLASSScheduler]
    name: str

    def native(self) -> Any:
        return getattr(diffusers, self.name)(**CONFIGS.get(self.name, SD))

    def glass(self, num_transitions: int = 3, **options: Any) -> GLASSScheduler:
        return self.cls.from_scheduler(self.native(), num_transitions=num_transitions, **options)


CASES = [*(Case(GLASSScheduler, name) for name in supported.SUPPORTED), Case(OURS[1], supported.FLOW[0])]


@pytest.fixture(params=CASES, ids=lambda case: f"{case.cls.__name__}-{case.name}")
def case(request):
    if request.param.name.startswith("Cosine"):
        pytest.importorskip("torchsde")
    return request.param


def noise(*shape):
    return torch.randn(*(shape or (2, 3, 8, 6)), generator=tiny.seeded())


def network(x):
    return torch.tanh(1.3 * x.roll(1, -1)) - 0.4 * x


def go(glass, x, start=0, stop=None, **step):
    """Take the calls from where the scheduler stands, or `start`, up to `stop`."""
    for t in glass.timesteps[glass.step_index or start : stop]:
        x = glass.step(network(x), t, x, **step).prev_sample
    return x


def run(glass, x=None, steps=7, **step):
    glass.set_timesteps(steps)
    return go(glass, noise() if x is None else x, **step)


def public(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("saved", ["ours", "native"])
def test_save_and_load(case, saved, tmp_path):
    options = {"num_transitions": 3, "correlation": 0.3, "corrector": False}
    glass, native = case.glass(**options), case.native()
    scheduler, more = (glass, {}) if saved == "ours" else (native, options)
    scheduler.save_config(tmp_path)
    scheduler.save_pretrained(tmp_path / "scheduler")
    expected = run(glass, generator=tiny.seeded(1))
    for where in ({}, {"subfolder": "scheduler"}):
        loaded = case.cls.from_pretrained(tmp_path, **where, **more)
        assert (type(loaded), public(loaded.config)) == (case.cls, public(glass.config))
        assert torch.equal(run(loaded, generator=tiny.seeded(1)), expected)


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_the_native_class_is_built_from_our_config(case, where, tmp_path):
    native, glass = case.native(), case.glass()
    glass.save_pretrained(tmp_path)
    assert type(native) in glass.compatibles
    back = type(native).from_pretrained(tmp_path) if where == "folder" else type(native).from_config(glass.config)
    assert {key: back.config[key] for key in public(native.config)} == public(native.config)


@pytest.mark.zoo
@pytest.mark.slow
def test_every_compatible_class_is_built_from_our_config():
    pytest.importorskip("torchsde")
    failures = {}
    for case in CASES:
        for cls in case.glass().compatibles:
            if cls is UnCLIPScheduler and type(case.native()) is not cls:  # it takes one table only
                continue
            try:
                cls.from_config(case.glass().config)
            except Exception as error:
                failures[f"{case.name} to {cls.__name__}"] = repr(error)
    assert not failures


def test_the_loaded_config_is_the_saved_one(tmp_path):
    """Of diffusers' own schedulers, too, but for the note of what was left at its default."""
    for scheduler in (DDIMScheduler(), GLASSScheduler(num_transitions=3)):
        scheduler.save_pretrained(tmp_path)
        expected = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
        assert expected == type(scheduler).from_pretrained(tmp_path).config


@pytest.mark.parametrize("kind", [list, np.array])
def test_trained_betas_are_saved(kind, tmp_path):
    glass = GLASSScheduler.from_scheduler(DDIMScheduler(trained_betas=kind([0.01 * i / 1000 for i in range(1, 1001)])))
    assert not torch.equal(run(GLASSScheduler.from_scheduler(DDIMScheduler())), run(glass))
    glass.save_pretrained(tmp_path)
    assert torch.equal(run(GLASSScheduler.from_pretrained(tmp_path)), run(glass))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_step(case, dtype):
    """Shape, dtype, dict or tuple; neither what is handed in is written to, nor, later, what was handed out."""
    glass, x = case.glass(num_transitions=7), noise().to(dtype)
    output, outs = network(x), []
    given = (x.clone(), output.clone())
    for return_dict in (True, False):
        glass.set_timesteps(7)
        for t in glass.timesteps[:3]:  # of the same sample
            out = glass.step(output, t, x, return_dict=return_dict)
            outs += [(value, value.clone()) for value in (out.values() if return_dict else out)]
        assert isinstance(out, dict if return_dict else tuple)
        assert list(glass.step(output, glass.timesteps[3], out[0])) == ["prev_sample", "pred_original_sample"]
    for (ours, then), (theirs, _) in zip(outs[:6], outs[6:], strict=True):
        assert (ours.shape, ours.dtype, bool(ours.isfinite().all())) == (x.shape, dtype, True)
        assert torch.equal(ours, then)
        assert torch.equal(ours, theirs)
    assert all(map(torch.equal, (x, output), given))


def test_public_api(case):
    glass, (x, eps) = case.glass(), noise(2, 4, 3, 8, 6)
    assert isinstance(glass.timesteps, torch.Tensor)
    assert (glass.order, float(glass.init_noise_sigma), len(glass)) == (1, 1.0, glass.config.num_train_timesteps)
    assert torch.equal(glass.scale_model_input(x, 0.0), x)
    glass.set_timesteps(10)
    t, rows = glass.timesteps, [5, 0, 5, 9]
    assert (t.shape, glass.sigmas.shape, glass.num_inference_steps) == ((10,), (11,), 10)
    noised, batch = glass.add_noise(x, eps, t[5][None]), glass.add_noise(x, eps, t[rows])
    singles = [glass.add_noise(x[i : i + 1], eps[i : i + 1], t[[j]]) for i, j in enumerate(rows)]
    torch.testing.assert_close(batch, torch.cat(singles))
    assert [torch.equal(*pair) for pair in zip(batch, noised, strict=True)] == [True, False, True, False]
    assert torch.equal(glass.scale_noise(x, t[5][None], eps), noised)
    for _ in range(2):
        assert (glass.begin_index, glass.step_index) == (None, None)
        glass.set_begin_index(2)
        last = go(glass, x, start=2, stop=3)
        assert (glass.begin_index, glass.step_index) == (2, 3)
        assert go(glass, last).isfinite().all()
        assert glass.step_index == 10
        glass.set_timesteps(10)


@pytest.mark.parametrize("cls", OURS)
def test_options_and_attributes(cls, tmp_path):
    glass = cls(num_transitions=3)
    glass.save_pretrained(tmp_path)
    assert not cls._deprecated_kwargs
    assert not [p for p in inspect.signature(cls.__init__).parameters.values() if p.kind is p.VAR_KEYWORD]
    unknown = "^from_config: unknown option bogus; GLASSScheduler takes num_transitions, "
    with pytest.raises(TypeError, match=r"__init__\(\) got an unexpected keyword argument 'bogus'$"):
        cls(bogus=1)
    for build, given in ((cls.from_config, glass.config), (cls.from_pretrained, tmp_path)):
        with pytest.raises(TypeError, match=unknown):
            build(given, bogus=1)
    glass.register_to_config(registered=6)
    for key, value in {"registered": 6, "num_transitions": 3, "max_shift": 1.15}.items():
        with pytest.warns(FutureWarning, match=f"config attribute `{key}` directly"):
            assert getattr(glass, key) == value
    with pytest.raises(AttributeError, match=f"^'{cls.__name__}' object has no attribute 'does_not_exist'$"):
        glass.does_not_exist  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("num_transitions", [1, 3])
def test_copies(case, num_transitions, seeded):
    """Made before `set_timesteps` (None), within a run and after it: a pickled one goes on as the original does."""

    def ends(glass, x, stop):
        if stop is None:
            glass.set_timesteps(7)
        return go(glass, x), run(glass)

    for stop in (None, 4, 7):
        glass, x = case.glass(num_transitions), noise()
        glass.set_generator(tiny.seeded(1) if seeded else None)
        if stop is not None:
            glass.set_timesteps(7)
            x = go(glass, x, stop=stop)
        unpicklable = case.name == "SASolverScheduler"  # which holds a lambda
        pickled = None if unpicklable else pickle.loads(pickle.dumps(glass))
        copied, expected = ends(copy.deepcopy(glass), x, stop), ends(glass, x, stop)
        assert unpicklable or all(map(torch.equal, ends(pickled, x, stop), expected))
        assert torch.equal(copied[0], expected[0]) == (num_transitions == 1 or stop == 7)
        assert torch.equal(copied[1], expected[1]) == (num_transitions == 1)


@pytest.mark.slow
def test_runs_in_turn(case):
    glass, few = case.glass(), 2 if case.name == "UnCLIPScheduler" else 1  # UnCLIP divides by N − 1
    for steps, shape in ((7, (2, 3, 8, 6)), (4, (3, 3, 4, 4)), (few, (1, 2, 3, 4, 4)), (7, (2, 3, 8, 6))):
        last = run(glass, noise(*shape), steps)
        assert last.isfinite().all()
        assert torch.equal(last, run(case.glass(), noise(*shape), steps))
        assert torch.equal(run(case.glass(50), steps=steps), run(case.glass(steps), steps=steps))


@pytest.mark.parametrize("key", ["timesteps", "sigmas"])
def test_custom_grids(case, key):
    glass, native = case.glass(), case.native()
    sigmas = [10.0, 5.0, 1.0, 0.1, 0.0] if case.name == "EulerDiscreteScheduler" else np.array([1, 0.7, 0.4, 0.1])
    call = {key: {"timesteps": [900, 600, 300, 50], "sigmas": sigmas}[key]}
    if key in inspect.signature(native.set_timesteps).parameters:
        call |= {"num_inference_steps": 4} if case.name == "HeliosScheduler" else {}
        native.set_timesteps(**call)
        glass.set_timesteps(**call)
        assert glass.timesteps.tolist() == list(dict.fromkeys(native.timesteps.tolist()))  # Heun's are there twice
        assert len(glass.timesteps) == 4
        assert go(glass, noise()).isfinite().all()
    else:
        with pytest.raises(ValueError, match=f"^set_timesteps: {case.name} takes no {key}: leave them out"):
            glass.set_timesteps(**call)
    assert torch.equal(run(glass), run(case.glass()))


def test_errors_leave_the_scheduler_usable(case):
    """The run goes on as if the call had not been made, and so does the next."""
    glass, expected = case.glass(), run(case.glass())
    glass.set_timesteps(7)
    with pytest.raises(ValueError, match=r"^step: timestep -5\.0 is not in scheduler\.timesteps"):
        glass.step(network(noise()), -5, noise())
    x = go(glass, noise(), stop=3)
    with pytest.raises(ValueError, match=r"^step: expected a sample of shape \(2, 3, 8, 6\), got \(1, 3, 8, 6\)"):
        glass.step(network(x[:1]), glass.timesteps[3], x[:1])
    with pytest.raises(ValueError, match=r"^eta: expected 0, got 0\.5: num_transitions sets"):
        glass.step(network(x), glass.timesteps[3], x, eta=0.5)
    assert torch.equal(go(glass, x), expected)
    with pytest.raises(ValueError, match="^step: the run has ended: call set_timesteps to begin another$"):
        glass.step(network(x), glass.timesteps[-1], x)
    assert torch.equal(run(glass), expected)


FRESH = """
import json, sys, diffusers, numpy, torch
calls = json.loads(sys.argv[1])
for path in calls:
    try:
        diffusers.DiffusionPipeline.from_pretrained(path)
    except ValueError as error:
        print(error)
import glassflows
for path, call in calls.items():
    pipe = diffusers.DiffusionPipeline.from_pretrained(path)
    print(type(pipe.scheduler).__name__)
    numpy.save(path + "/images.npy", pipe(generator=torch.Generator().manual_seed(0), **call).images)
"""


@pytest.mark.slow
def test_pipelines_load_in_a_fresh_process(tmp_path):
    """Once glassflows is imported; before, diffusers says to import it."""
    calls, images = {}, {}
    for make, cls in ((tiny.flux, OURS[0]), (tiny.sd, OURS[0]), (tiny.flux, OURS[1])):
        pipe, path = make(), str(tmp_path / f"{make.__name__}-{cls.__name__}")
        pipe.scheduler = cls.from_config(pipe.scheduler.config, num_transitions=2)
        pipe.save_pretrained(path)
        assert pipe.load_config(path)["scheduler"] == ["glassflows", cls.__name__]
        calls[path] = {"prompt": "a cat", "height": 16, "width": 24, "num_inference_steps": 4, "output_type": "np"}
        images[path] = pipe(generator=tiny.seeded(), **calls[path]).images
    command, env = [sys.executable, "-c", FRESH, json.dumps(calls)], os.environ | {"HF_HUB_OFFLINE": "1"}
    fresh = subprocess.run(command, env=env, capture_output=True, text=True)
    assert fresh.returncode == 0, fresh.stderr
    *refusals, flux, sd, flow = fresh.stdout.splitlines()
    assert len(refusals) in (0, 3)  # diffusers 0.37 imports it without being told
    assert all("import glassflows before calling `from_pretrained`" in line for line in refusals)
    assert [flux, sd, flow] == ["GLASSScheduler", "GLASSScheduler", "GLASSFlowMatchScheduler"]
    for path, expected in images.items():
        np.testing.assert_allclose(np.load(f"{path}/images.npy"), expected, atol=1e-5)
