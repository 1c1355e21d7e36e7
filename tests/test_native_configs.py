"""What a native scheduler's config says is what is sampled, and what cannot be sampled is refused with its reason."""

import copy
import logging
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGImg2ImgPipeline,
    StableDiffusionPAGInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

import tiny
from glassflows import FeynmanKacSteerer, GLASSFlowMatchScheduler, GLASSScheduler, VariancePreserving
from glassflows.scheduler import supported
from glassflows.scheduler.native import Native

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LINEAR_ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
RAISED = [EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]
"""They raise the last ᾱ from 0 to 2**-24."""


def name_of(value):
    return value.__name__ if isinstance(value, type) else None


def network(x, t):
    return torch.tanh(1.3 * x.roll(1, -1) + 0.4 * math.sin(float(t) / 300)) - 0.5 * x


def latents():
    return torch.randn(2, 3, 6, 10, generator=tiny.seeded())


def public(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


# ---- what the constructors of pipelines mend -------------------------------------------------------------------------

MENDING = [
    StableDiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPAGImg2ImgPipeline,
    StableDiffusionPAGInpaintPipeline,
]
NATIVES = [DDIMScheduler, PNDMScheduler, DDPMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler]
WAYS = {
    "from_config": lambda pipe: GLASSScheduler.from_config(pipe.scheduler.config),
    "from_scheduler": lambda pipe: GLASSScheduler.from_scheduler(pipe.scheduler),
    "twice": lambda pipe: GLASSScheduler.from_config(GLASSScheduler.from_config(pipe.scheduler.config).config),
}


def mended(cls, native, **config):
    """Return a pipeline whose constructor found an outdated scheduler that was built in memory."""
    with pytest.warns(FutureWarning, match="should be set to"):
        return tiny.sd(cls, scheduler=native(**SD, **config))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("native", NATIVES, ids=name_of)
@pytest.mark.parametrize("cls", MENDING, ids=name_of)
def test_what_a_constructor_mended_is_kept(cls, native, way):
    """Its timesteps are those of the mended native object, which begin and end one later than it was built."""
    more = {"timestep_spacing": "leading"}
    config = {EulerDiscreteScheduler: more, UniPCMultistepScheduler: more, PNDMScheduler: {"skip_prk_steps": True}}
    pipe = mended(cls, native, **config.get(native, {}))
    expected = {key: pipe.scheduler.config[key] for key in public(pipe.scheduler.config)}
    assert expected["steps_offset"] == 1
    glass = WAYS[way](pipe)
    assert {key: glass.config[key] for key in expected} == expected
    assert glass.config["native"] == {"_class_name": native.__name__, **expected}
    glass.set_timesteps(6)
    pipe.scheduler.set_timesteps(6)
    theirs = list(dict.fromkeys(pipe.scheduler.timesteps.tolist()))  # PNDM's repeat one
    assert glass.timesteps.tolist() == theirs
    assert theirs[-1] == 1 or native is UniPCMultistepScheduler  # whose grid of 7 leaves out the last


def test_stable_diffusion_keeps_its_offset():
    pipe = mended(StableDiffusionPipeline, DDIMScheduler)
    glass = GLASSScheduler.from_config(pipe.scheduler.config)
    glass.set_timesteps(6)
    assert glass.timesteps.tolist() == [831, 665, 499, 333, 167, 1]
    assert glass.config.clip_sample is False
    outdated = GLASSScheduler.from_config(DDIMScheduler(**SD).config)
    outdated.set_timesteps(6)
    assert outdated.timesteps.tolist() == [830, 664, 498, 332, 166, 0]


def test_inpainting_keeps_what_it_mends_of_pndm():
    pipe = mended(StableDiffusionInpaintPipeline, PNDMScheduler)
    glass = GLASSScheduler.from_config(pipe.scheduler.config)
    assert glass.config.skip_prk_steps is True
    assert "skip_prk_steps" in pipe.scheduler.config["_use_default_values"]


@pytest.mark.parametrize("when", ["built with it", "before its run", "after its run"])
def test_the_way_back_keeps_what_a_constructor_mended(when):
    """Of our own config, too, which the constructor mends like any other."""
    glass = GLASSScheduler.from_config(DDIMScheduler(**SD).config)
    with pytest.warns(FutureWarning, match="should be set to"):
        pipe = tiny.sd(scheduler=glass)
    if when == "after its run":
        pipe.scheduler.set_timesteps(6)
        assert pipe.scheduler.timesteps.tolist() == [831, 665, 499, 333, 167, 1]
    if when == "built with it":
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
    back = DDIMScheduler.from_config(pipe.scheduler.config)
    assert (back.config.steps_offset, back.config.clip_sample) == (1, False)


def test_what_is_left_at_its_default_stays_so():
    """Another class has another default, as if the native config had been handed to it."""
    native = DDIMScheduler(**SD)
    theirs = DDPMScheduler.from_config(native.config)
    ours = DDPMScheduler.from_config(GLASSScheduler.from_config(native.config, solver_order=1).config)
    assert public(ours.config) == public(theirs.config)
    solver = DPMSolverMultistepScheduler.from_config(GLASSScheduler.from_config(native.config, solver_order=1).config)
    assert solver.config.solver_order == 2  # its own default, not our option of that name


# ---- tables of noise -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
@pytest.mark.parametrize("native", [*RAISED, EulerAncestralDiscreteScheduler], ids=name_of)
def test_linear_betas_may_be_rescaled_to_zero_snr(native, spacing):
    """Grid and ODE are the native ones, though the last entry, raised to 2**-24, exceeds those before it."""
    options = {"solver_order": 1} if native in RAISED[1:] else {}
    options |= {"disable_corrector": list(range(9))} if native is UniPCMultistepScheduler else {}
    theirs = native(**LINEAR_ZERO_SNR, timestep_spacing=spacing, **options)
    assert theirs.alphas_cumprod[-1] > theirs.alphas_cumprod[-2]
    ours = GLASSScheduler.from_config(theirs.config, num_transitions=1, solver_order=1)
    last = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(8)
        x = latents()
        if scheduler is theirs and native not in RAISED[1:]:
            x = x * math.hypot(1.0, theirs.sigmas[0])
        for t in scheduler.timesteps:
            output = network(scheduler.scale_model_input(x, t), t)
            more = {"generator": tiny.seeded()} if native is EulerAncestralDiscreteScheduler else {}
            x = scheduler.step(output, t, x, return_dict=False, **more)[0]
        last.append(x)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=1e-6)
    if native is not EulerAncestralDiscreteScheduler:  # which is no ODE
        torch.testing.assert_close(*last, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("native", RAISED, ids=name_of)
def test_a_table_that_decreases_is_left_as_it_is(native):
    """Of scaled-linear betas the raised entry is still the smallest."""
    scheduler = native(**SD, **LINEAR_ZERO_SNR)
    level = Native(scheduler).level_at(999)
    assert level.alpha**2 == pytest.approx(2**-24, rel=1e-6)
    assert Native(native(**LINEAR_ZERO_SNR)).level_at(999).alpha == pytest.approx(0, abs=1e-12)


def test_other_tables_that_rise_are_refused():
    table = DDIMScheduler(trained_betas=[0.01] * 1000)
    table.alphas_cumprod[-1] = table.alphas_cumprod[-3]
    with pytest.raises(ValueError, match=r"betas: expected noise that grows .* mend beta_start, beta_end"):
        GLASSScheduler.from_scheduler(table)


@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler, diffusers.CogVideoXDDIMScheduler], ids=name_of)
def test_nothing_can_be_denoised_by_epsilon_where_there_is_no_signal(cls):
    """ẑ = (x − σ ε)/α is 0/0 there, natively too; where the grid begins later, or v is predicted, it is not."""
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    glass = GLASSScheduler.from_config(cls(**zero, prediction_type="epsilon").config)
    with pytest.raises(ValueError, match=r"signal at each call .* timestep 999, .*'v_prediction'.*rescale.*'leading'"):
        glass.set_timesteps(5)
    for change in ({"prediction_type": "v_prediction"}, {"prediction_type": "sample"},
                   {"timestep_spacing": "leading"}, {"rescale_betas_zero_snr": False}):  # fmt: skip
        ours = GLASSScheduler.from_config(cls(**{**zero, "prediction_type": "epsilon", **change}).config)
        ours.set_timesteps(5)
        x = latents()
        for t in ours.timesteps:
            x = ours.step(network(x, t), t, x).prev_sample
        assert x.isfinite().all()


BETAS = {
    "empty": ([], r"shape \(0,\)"),
    "nan": ([0.01] * 400 + [math.nan] + [0.01] * 599, "nan at 400"),
    "infinite": ([0.01] * 999 + [math.inf], "inf at 999"),
    "zero": ([0.0] + [0.01] * 999, "0 at 0"),
    "negative": (np.array([0.01] * 999 + [-0.01]), "-0.01 at 999"),
    "square": ([[0.01] * 1000], r"shape \(1, 1000\)"),
}


@pytest.mark.parametrize("case", BETAS)
@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler], ids=name_of)
def test_betas_that_are_no_shares_of_noise_are_refused(cls, case):
    betas, shown = BETAS[case]
    with pytest.raises(ValueError, match=rf"^trained_betas: expected .* in \(0, 1\].*{shown}"):
        GLASSScheduler.from_config(cls(**SD).config, trained_betas=betas)
    with pytest.raises(ValueError, match=r"^trained_betas"):
        GLASSScheduler(native={"_class_name": cls.__name__, "trained_betas": betas})


@pytest.mark.parametrize("ends", [{"beta_start": math.nan}, {"beta_end": math.nan}, {"beta_start": -0.1}], ids=str)
def test_ends_of_betas_that_are_no_shares_of_noise_are_refused(ends):
    with pytest.raises(ValueError, match="betas: expected noise that grows with every training timestep"):
        GLASSScheduler.from_scheduler(DDIMScheduler(**ends))


@pytest.mark.parametrize("table", [[], [0.5, math.nan, 0.1], [0.5, 0.2, math.nan], [math.nan, 0.5], [0.5, 0.5]])
def test_a_table_of_no_numbers_is_no_noise_schedule(table):
    with pytest.raises(ValueError, match="alphas_cumprod: expected a one-dimensional table that decreases"):
        VariancePreserving(table)


def test_betas_of_another_length_than_the_timesteps():
    """Fewer cannot be indexed; of more, natively, the first are the timesteps."""
    betas = np.linspace(1e-4, 0.03, 700)
    with pytest.raises(ValueError, match="num_train_timesteps: expected one for each beta, 700, got 1000"):
        GLASSScheduler.from_scheduler(DDIMScheduler(trained_betas=betas))
    native = DDIMScheduler(trained_betas=betas, num_train_timesteps=500, clip_sample=False)
    glass = GLASSScheduler.from_scheduler(native, num_transitions=1, solver_order=1)
    last = []
    for scheduler in (native, glass):
        scheduler.set_timesteps(5)
        x = latents()
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
        last.append(x)
    torch.testing.assert_close(*last, rtol=2e-4, atol=2e-4)


# ---- timesteps -------------------------------------------------------------------------------------------------------


def begun(**options):
    glass = GLASSScheduler.from_scheduler(DDIMScheduler(**tiny.SD_SCHEDULER), **options)
    glass.set_timesteps(6)
    x = latents()
    return glass, glass.step(network(x, glass.timesteps[0]), glass.timesteps[0], x).prev_sample


FORMS = {
    "int": lambda t: int(t),
    "float": lambda t: float(t),
    "numpy": lambda t: np.float32(t),
    "int64": lambda t: t,
    "int32": lambda t: t.int(),
    "float32": lambda t: t.float(),
    "bfloat16": lambda t: t.bfloat16(),
    "float16": lambda t: t.half(),
    "one": lambda t: t[None],
    "rows": lambda t: t.expand(2),
    "tokens": lambda t: torch.tensor([[0, int(t), 0], [int(t), int(t), 0]]),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_timestep_due_is_taken_in_every_form_a_host_gives_it(form):
    glass, x = begun()
    plain, y = begun()
    for t in glass.timesteps[1:]:
        x, y = glass.step(network(x, t), FORMS[form](t), x).prev_sample, plain.step(network(y, t), t, y).prev_sample
    assert torch.equal(x, y)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("i", [0, 2, 5])
def test_a_timestep_that_is_not_due_is_refused(form, i):
    """And the run goes on as if it had not been handed in."""
    glass, x = begun()
    expected = glass.timesteps[1]
    with pytest.raises(ValueError, match=r"step: expected timestep 665, which is due at call 1, got .*set_timesteps"):
        glass.step(x, FORMS[form](glass.timesteps[i]), x)
    assert glass.step_index == 1
    assert glass.step(x, expected, x).prev_sample.isfinite().all()


def test_fractional_timesteps_are_due_to_rounding():
    glass = GLASSScheduler.from_scheduler(DDIMScheduler(**tiny.SD_SCHEDULER), correlation=0.3)
    glass.set_timesteps(12)
    x = latents()
    assert (glass.timesteps % 1 > 0).any()
    for i, t in enumerate(glass.timesteps):
        x = glass.step(x, int(t) if i else t, x).prev_sample  # as a host that embeds integers does
    glass.set_timesteps(12)
    glass.step(x, glass.timesteps[0], x)
    with pytest.raises(ValueError, match="which is due at call 1"):
        glass.step(x, int(glass.timesteps[1]) + 2, x)


def test_a_run_that_begins_elsewhere_is_told_so():
    glass, _ = begun()
    glass.set_timesteps(6)
    glass.set_begin_index(2)
    with pytest.raises(ValueError, match="expected timestep 499, which is due at call 2, got 831"):
        glass.step(latents(), 831, latents())
    assert glass.step(latents(), 499, latents()).prev_sample.isfinite().all()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [GLASSScheduler, GLASSFlowMatchScheduler], ids=name_of)
def test_sigmas_that_are_no_numbers_are_named(cls):
    glass = cls.from_scheduler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    with pytest.raises(ValueError, match="expected finite sigmas, got nan at 2 of 5: mend") as error:
        glass.set_timesteps(sigmas=[1.0, 0.7, math.nan, 0.2], mu=0.8)
    assert "isinstance" not in str(error.value)
    with pytest.raises(ValueError, match="expected finite sigmas, got nan at 0, nan at 1, nan at 2 of 5: .*mu given"):
        glass.set_timesteps(sigmas=[1.0, 0.7, 0.4, 0.2], mu=math.nan)
    with pytest.raises(ValueError, match="expected finite timesteps, got nan at 1 of 3"):
        glass.set_timesteps(sigmas=[1.0, 0.7, 0.4], timesteps=[1000.0, math.nan, 400.0], mu=0.8)


def test_sigmas_at_fault_are_shown():
    """Not the first eight, which are in order."""
    sigmas = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.55, 0.4, 0.4, 0.1]
    with pytest.raises(
        ValueError, match=r"got sigmas 0\.5 at call 9 and then 0\.55; 0\.4 at call 11 and then 0\.4: mend"
    ):
        GLASSScheduler().set_timesteps(sigmas=sigmas)
    with pytest.raises(ValueError, match="got sigmas 0 at call 2"):
        GLASSScheduler().set_timesteps(sigmas=[1.0, 0.5, 0.0])


def test_a_pipeline_that_sends_sigmas_itself_needs_another_scheduler():
    pipe = tiny.flux()
    pipe.scheduler = GLASSScheduler.from_scheduler(DDIMScheduler(**tiny.SD_SCHEDULER))
    with pytest.raises(ValueError, match="takes no sigmas: leave them out, or, where the pipeline sends them itself"):
        pipe("a cat", num_inference_steps=2, **tiny.FLUX_CALL)


@pytest.mark.parametrize("left_out", ["native", "glass"])
def test_a_config_without_its_native_is_refused(left_out, tmp_path):
    config = {key: value for key, value in GLASSScheduler().config.items() if key != left_out}
    with pytest.raises(ValueError, match=rf"config: expected that of a GLASSScheduler.* none under '{left_out}'"):
        GLASSScheduler.from_config(config)
    with pytest.raises(ValueError, match="none under 'native' and 'glass': save it by save_pretrained"):
        GLASSScheduler.from_config({"_class_name": "GLASSScheduler", "num_transitions": 3})


def test_a_native_without_its_class_is_refused():
    config = dict(GLASSScheduler().config)
    config["native"] = {key: value for key, value in config["native"].items() if key != "_class_name"}
    with pytest.raises(ValueError, match="none under '_class_name' in 'native'"):
        GLASSScheduler.from_config(config)
    with pytest.raises(ValueError, match=r"native: expected the config .* got DDIMScheduler: use .*from_scheduler"):
        GLASSScheduler(native=DDIMScheduler())


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (0,), ()], ids=str)
def test_a_batch_of_no_rows_is_refused(shape):
    glass = GLASSScheduler()
    glass.set_timesteps(4)
    empty = torch.empty(shape)
    with pytest.raises(ValueError, match="step: expected a sample with at least one row, got shape"):
        glass.step(empty, glass.timesteps[0], empty)


@pytest.mark.parametrize(("inner", "advice"), [
    ("decoder_pipe", "steer pipe.decoder_pipe, with the embeddings that pipe.prior_pipe returns"),
    ("generation_pipe", "steer pipe.generation_pipe, and hand its images to pipe.upsampling_pipe"),
])  # fmt: skip
def test_a_combined_pipeline_says_which_to_steer(inner, advice):
    pipe = tiny.flux()
    setattr(pipe, inner, tiny.flux())
    with pytest.raises(ValueError, match=f"it hands its call to others: {advice}"):
        FeynmanKacSteerer(pipe, lambda images, prompts: images.mean((1, 2, 3)))


def test_visual_cloze_says_which_to_steer():
    inner = tiny.flux()
    parts = {name: inner.components[name] for name in ("vae", "text_encoder", "tokenizer", "text_encoder_2",
                                                       "tokenizer_2", "transformer", "scheduler")}  # fmt: skip
    pipe = diffusers.VisualClozePipeline(**parts, resolution=16)
    pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler)
    assert not isinstance(pipe.generation_pipe.scheduler, GLASSScheduler)  # hence the refusal
    with pytest.raises(ValueError, match="VisualClozePipeline cannot be steered: .* steer pipe.generation_pipe"):
        FeynmanKacSteerer(pipe, lambda images, prompts: images.mean((1, 2, 3)))


# ---- there and back --------------------------------------------------------------------------------------------------

CONFIGS = {
    **{name: {"shift": 3.0} for name in supported.FLOW},
    "HeliosScheduler": {"stages": 1},
    "UnCLIPScheduler": {"variance_type": "learned_range"},
    "PNDMScheduler": {**SD, "skip_prk_steps": True},
    "EDMDPMSolverMultistepScheduler": {"sigma_schedule": "exponential"},
    "CosineDPMSolverMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {**SD, "solver_order": 3},
}


def native_of(name):
    if name.startswith("Cosine"):
        pytest.importorskip("torchsde")
    return getattr(diffusers, name)(**CONFIGS.get(name, SD))


@pytest.fixture
def logged():
    """What diffusers logs, which pytest's own fixture does not see."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("name", supported.SUPPORTED)
def test_the_way_back_is_silent_and_exact(name, where, logged, tmp_path):
    """Also of a config that was read from disk; and the native's config is as if we had never been there."""
    native = native_of(name)
    glass = GLASSScheduler.from_scheduler(native, num_transitions=3, solver_order=1)
    if where == "disk":
        glass.save_pretrained(tmp_path)
        glass = GLASSScheduler.from_pretrained(tmp_path)
    logged.clear()
    back = type(native).from_config(glass.config)
    assert logged == []
    assert public(back.config) == public(native.config)


@pytest.mark.parametrize("name", supported.SUPPORTED)
def test_natives_read_a_saved_config_in_silence(name, logged, tmp_path):
    """A folder of ours is a folder of the native's, whose config is as if saved by itself; ours comes back whole."""
    native, own = native_of(name), tmp_path / "own"
    native.save_pretrained(own)
    glass = GLASSScheduler.from_scheduler(native, num_transitions=3, solver_order=1, correlation=0.5)
    glass.save_pretrained(tmp_path)
    logged.clear()
    back = type(native).from_pretrained(tmp_path)
    assert logged == []
    assert public(back.config) == public(type(native).from_pretrained(own).config)
    again = GLASSScheduler.from_pretrained(tmp_path)
    assert again.config["glass"] == glass.config["glass"]
    assert again.config["native"] == glass.config["native"]
    assert "_use_default_values" not in glass.to_json_string()


def test_of_other_configs_diffusers_still_warns(logged, tmp_path):
    """What is left out in silence is ours, and nothing else."""
    glass = GLASSScheduler.from_scheduler(native_of("DDIMScheduler"))
    glass.register_to_config(mine=3)
    glass.save_pretrained(tmp_path)
    diffusers.DDIMScheduler.from_pretrained(tmp_path)
    assert [line[: line.index(" were passed")] for line in logged] == ["The config attributes {'mine': 3}"]


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.parametrize("name", supported.SUPPORTED)
def test_another_class_reads_of_our_config_what_it_reads_of_the_natives(name):
    native = native_of(name)
    glass, config = GLASSScheduler.from_scheduler(native), {**native.config, "_class_name": name}
    for cls in native.compatibles:
        if cls is diffusers.UnCLIPScheduler and name != cls.__name__:  # it takes one table only
            continue
        theirs, ours = (cls.from_config(one).config for one in (config, glass.config))
        assert public(ours) == public(theirs)


@pytest.mark.parametrize(("cls", "name"), [
    *((GLASSScheduler, name) for name in supported.SUPPORTED), (GLASSFlowMatchScheduler, supported.FLOW_MATCH_EULER),
], ids=name_of)  # fmt: skip
def test_compatibles_are_the_natives(cls, name):
    native = native_of(name)
    glass = cls.from_scheduler(native)
    assert set(glass.compatibles) == set(native.compatibles)
    assert type(cls.from_config(glass.config)) is cls


# ---- a native scheduler that has run ---------------------------------------------------------------------------------

RUN = {
    "UniPC": (UniPCMultistepScheduler, {}),
    "DPM": (DPMSolverMultistepScheduler, {"solver_order": 3}),
    "DPM, singlestep": (diffusers.DPMSolverSinglestepScheduler, {}),
    "DEIS": (diffusers.DEISMultistepScheduler, {}),
    "SA": (diffusers.SASolverScheduler, {}),
    "PNDM": (PNDMScheduler, {"skip_prk_steps": True}),
    "LMS": (diffusers.LMSDiscreteScheduler, {}),
    "Heun": (diffusers.HeunDiscreteScheduler, {}),
    "Euler": (EulerDiscreteScheduler, {}),
    "DDIM": (DDIMScheduler, {}),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("case", RUN)
def test_a_native_that_has_run_is_wrapped_without_its_run(case, gradients):
    """It keeps the network's outputs, with their graph; the scheduler made of it holds no latents and goes its way."""
    cls, options = RUN[case]
    native = cls(**SD, **options)
    fresh = GLASSScheduler.from_scheduler(cls(**SD, **options))
    native.set_timesteps(8)
    x = latents().requires_grad_(gradients)
    for t in native.timesteps[:5]:
        x = native.step(network(native.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    before = {key: id(value) for key, value in vars(native).items()}
    glass = GLASSScheduler.from_scheduler(native)
    assert {key: id(value) for key, value in vars(native).items()} == before  # it is left alone
    held = [value for value in vars(glass._native.scheduler).values() if isinstance(value, (list, torch.Tensor))]
    tensors = [one for value in held for one in (value if isinstance(value, list) else [value])]
    assert all(one.ndim < 2 and not one.requires_grad for one in tensors if isinstance(one, torch.Tensor))
    assert torch.equal(glass.timesteps, fresh.timesteps)
    ends = []
    for one in (glass, fresh):
        one.set_timesteps(6)
        y = latents()
        for t in one.timesteps:
            y = one.step(network(y, t), t, y, generator=tiny.seeded(1)).prev_sample
        ends.append(y)
    assert torch.equal(*ends)
    copy.deepcopy(glass)


def test_what_was_changed_on_the_object_is_kept():
    """A shift that was set, and a table that was replaced and that gradients flow to."""
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_shift(4.0)
    flow.set_timesteps(6)
    glass = GLASSScheduler.from_scheduler(flow)
    glass.set_timesteps(6)
    assert glass.timesteps.tolist() == flow.timesteps.tolist()
    ddim = DDIMScheduler(**SD)
    ddim.alphas_cumprod = torch.linspace(0.99, 0.01, 1000, requires_grad=True) * 1.0
    glass = GLASSScheduler.from_scheduler(ddim)
    z, noise = torch.randn(2, 1, 3, 6, 10, generator=tiny.seeded())
    expected = ddim.add_noise(z, noise, torch.tensor([499])).detach()
    torch.testing.assert_close(glass.add_noise(z, noise, torch.tensor([499])), expected)
