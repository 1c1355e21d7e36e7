"""Configs: from one scheduler to another and back, in memory, on disk, and under constructors that rewrite them."""

import copy

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
)

import tiny
from glassflows import GLASSScheduler, renewal
from glassflows.scheduler import config as configs
from glassflows.scheduler import supported
from schedules import NATIVES, SD
from zoo.survey import cases

# ---- construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NATIVES)
def test_every_way_of_construction_agrees(name, tmp_path):
    """And native keys survive it, both ways."""
    native = NATIVES[name]
    made = GLASSScheduler.from_scheduler(native, num_transitions=3)
    from_memory = GLASSScheduler.from_config(native.config, num_transitions=3)
    from_memory.save_pretrained(tmp_path)
    for other in (from_memory, GLASSScheduler.from_pretrained(tmp_path), GLASSScheduler.from_config(made.config)):
        assert other.config["native"] == made.config["native"]
        assert other.config.num_transitions == 3
        made.set_timesteps(7)
        other.set_timesteps(7)
        assert torch.equal(made.timesteps, other.timesteps)
        assert torch.equal(made.sigmas, other.sigmas)
    own = {key: value for key, value in native.config.items() if not key.startswith("_")}
    back = type(native).from_config(from_memory.config)
    for scheduler in (from_memory, back):
        assert {key: scheduler.config[key] for key in own} == own


def test_saved_config_of_another_class_is_used_by_name(tmp_path):
    NATIVES["ddim"].save_pretrained(tmp_path)
    config = DDIMScheduler.load_config(tmp_path)
    assert GLASSScheduler.from_config(config).config["native"]["_class_name"] == "DDIMScheduler"


def test_class_is_told_by_the_keys_alone():
    """But for twins, which differ in how they step and not in what they tell of their grid."""
    twins = {"DDIMParallelScheduler": "DDIMScheduler", "DDPMParallelScheduler": "DDPMScheduler",
             "CogVideoXDPMScheduler": "CogVideoXDDIMScheduler"}  # fmt: skip
    for name in supported.SUPPORTED:
        config = getattr(diffusers, name)().config
        assert "_class_name" not in config
        if name != "FlowMatchHeunDiscreteScheduler":
            assert configs.class_name(config) == twins.get(name, name)
    distilled = getattr(diffusers, "FlowMapEulerDiscreteScheduler", None)  # of the keys of FlowMatchHeun
    ambiguous = [FlowMatchHeunDiscreteScheduler().config, distilled().config] if distilled else []
    of_several = "FlowMatchHeunDiscreteScheduler or FlowMapEulerDiscreteScheduler"
    for config, told in (*((one, of_several) for one in ambiguous), ({}, "no scheduler")):
        expected = rf"its keys are those of {told}: use GLASSScheduler\.from_scheduler\(pipe\.scheduler\)"
        with pytest.raises(ValueError, match=expected):
            configs.class_name(config)


def test_native_keys_can_be_overridden():
    glass = GLASSScheduler.from_config(NATIVES["flow"].config, shift=1.0)
    glass.set_timesteps(4, sigmas=[1.0, 0.75, 0.5, 0.25])
    assert glass.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_bad_configs():
    with pytest.raises(ValueError, match=r"keys are those of no scheduler: use GLASSScheduler\.from_scheduler\(pipe"):
        GLASSScheduler.from_config({"num_train_timesteps": 1000})
    with pytest.raises(TypeError, match="from_config: unknown option num_transition; GLASSScheduler takes num_trans"):
        GLASSScheduler.from_config(NATIVES["flow"].config, num_transition=4)
    for given, kind in (("folder", "str"), (NATIVES["ddim"], "DDIMScheduler")):
        expected = rf"config: expected a scheduler's config, got {kind}: pass pipe\.scheduler\.config, or use"
        with pytest.raises(TypeError, match=expected):
            GLASSScheduler.from_config(given)
    with pytest.raises(TypeError, match=r"scheduler: expected pipe\.scheduler, got NoneType"):
        GLASSScheduler.from_scheduler(None)


def test_schedulers_without_a_counterpart():
    with pytest.raises(ValueError, match="got LCMScheduler, which has no GLASS counterpart: its network was distilled"):
        GLASSScheduler.from_scheduler(LCMScheduler())
    expected = r"prediction_type: expected one of \('epsilon', .*\) for DPMSolverMultistepScheduler, got 'flow_pred"
    with pytest.raises(ValueError, match=expected):
        GLASSScheduler.from_scheduler(DPMSolverMultistepScheduler(prediction_type="flow_prediction"))


# ---- there and back --------------------------------------------------------------------------------------------------


def test_keys_of_the_same_name_survive_both_ways():
    """DPM-Solver++ has a `solver_order` of its own."""
    native = DPMSolverMultistepScheduler(solver_order=3, **SD)
    glass = GLASSScheduler.from_config(native.config, solver_order=1)
    assert glass.config.solver_order == 3
    assert DPMSolverMultistepScheduler.from_config(glass.config).config.solver_order == 3
    assert GLASSScheduler.from_config(glass.config).config["glass"]["solver_order"] == 1


def test_there_and_back_and_there_again():
    """A native built from a GLASS config and changed is what counts, not what the config once held."""
    glass = GLASSScheduler.from_config(NATIVES["flow"].config, num_transitions=2)
    native = FlowMatchEulerDiscreteScheduler.from_config(glass.config, shift=5.0)
    again = GLASSScheduler.from_config(native.config)
    assert again.config["native"]["shift"] == again.config.shift == 5.0
    other = DDIMScheduler.from_config(GLASSScheduler.from_config(NATIVES["pndm"].config).config)
    assert GLASSScheduler.from_scheduler(other).config["native"]["_class_name"] == "DDIMScheduler"


def test_keys_left_behind_by_another_class_are_ignored():
    """Euler neither clips nor thresholds, whatever the DDIM config it was built from says."""
    native = EulerDiscreteScheduler.from_config(DDIMScheduler(clip_sample=True, thresholding=True).config)
    glass = GLASSScheduler.from_scheduler(native)
    glass.set_timesteps(4)
    x = torch.full((1, 3, 4, 4), 50.0)
    assert glass.step(torch.zeros_like(x), glass.timesteps[0], x).pred_original_sample.min() > 50


def test_options_survive_saving(tmp_path):
    for name, value in {"first_transition": "posterior", "correlation": [0.0, 0.4, "ddpm"]}.items():
        GLASSScheduler(num_transitions=3, **{name: value}).save_pretrained(tmp_path)
        assert GLASSScheduler.from_pretrained(tmp_path).config[name] == value


def test_functions_of_correlation_survive_in_memory_and_are_asked_for_again_on_disk(tmp_path):
    rule = renewal(0.5)
    scheduler = GLASSScheduler(correlation=rule, num_transitions=3)
    assert "function" in str(scheduler)  # its config is still JSON
    for other in (copy.deepcopy(scheduler), GLASSScheduler.from_scheduler(scheduler)):
        other.set_timesteps(9)
        scheduler.set_timesteps(9)
        assert torch.equal(other.timesteps, scheduler.timesteps)
    scheduler.save_pretrained(tmp_path)
    expected = r"a function of t and t′ \(which a config does not save: pass it again\)"
    with pytest.raises(ValueError, match=expected):
        GLASSScheduler.from_pretrained(tmp_path)
    again = GLASSScheduler.from_config(scheduler.config, correlation=rule)
    again.set_timesteps(9)
    assert torch.equal(again.timesteps, scheduler.timesteps)


# ---- constructors that rewrite the scheduler's config ----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_a_constructor_mends_is_heeded():
    """Stable Diffusion's sets `clip_sample` and `steps_offset` of outdated configs, wherever the scheduler is put."""
    outdated = {"beta_schedule": "scaled_linear", "clip_sample": True, "steps_offset": 0}
    images = []
    for glass in (False, True):
        scheduler = DDIMScheduler(**outdated)
        if glass:
            scheduler = GLASSScheduler.from_scheduler(scheduler, num_transitions=1, solver_order=1)
        toy = tiny.Toy(lambda scheduler=scheduler: tiny.sd(scheduler=scheduler), tiny.CALLS[tiny.sd])
        images.append(toy.run(num_inference_steps=5))
    np.testing.assert_allclose(*images, atol=1e-5)
    assert toy.pipe.scheduler.timesteps[-1] == 1
    made_anew = GLASSScheduler.from_config(toy.pipe.scheduler.config)
    assert made_anew.config["native"]["steps_offset"] == 1
    assert made_anew.config["glass"]["num_transitions"] == 1


@pytest.mark.slow
@tiny.DIFFUSERS_42
def test_what_a_constructor_adds_is_heeded():
    case = cases()["Cosmos2TextToImagePipeline"]
    pipe = case.build()
    native = type(pipe.scheduler)(**{k: v for k, v in pipe.scheduler.config.items() if k == "use_karras_sigmas"})
    glass = GLASSScheduler.from_scheduler(native, num_transitions=1, solver_order=1)
    outputs = []
    for scheduler in (native, glass):
        again = type(pipe)(**{**pipe.components, "scheduler": scheduler})
        again.set_progress_bar_config(disable=True)
        outputs.append(again(num_inference_steps=5, generator=tiny.seeded(), output_type="np", **case.call())[0])
    np.testing.assert_allclose(*outputs, atol=2 / 255)


def test_edited_options_count():
    config = dict(GLASSScheduler(num_transitions=5).config) | {"num_transitions": 2}
    assert GLASSScheduler.from_config(config).config["glass"]["num_transitions"] == 2
