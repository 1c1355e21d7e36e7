"""What pipelines and training scripts read of a scheduler is there on ours, and says what the native says."""

import copy
import math
import pickle

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

import tiny
from glassflows import GLASSFlowMatchScheduler, GLASSScheduler, VariancePreserving, renewal
from glassflows.scheduler import supported

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONFIGS = {
    **{name: {"shift": 3.0} for name in supported.FLOW},
    "HeliosScheduler": {"stages": 1},
    "UnCLIPScheduler": {"variance_type": "learned_range"},
    "PNDMScheduler": {**SD, "skip_prk_steps": True},
    "EDMDPMSolverMultistepScheduler": {},
    "CosineDPMSolverMultistepScheduler": {},
}
RUN = ["model_outputs", "step_euler", "step_unipc", "step_plms", "ets", "counter", "lower_order_nums", "derivatives",
       "multistep_uni_p_bh_update", "batch_step_no_noise", "convert_model_output", "cur_sample"]  # fmt: skip
HOSTS_ASK = ["set_begin_index", "scale_model_input", "add_noise", "init_noise_sigma", "order"]


@pytest.fixture(params=supported.SUPPORTED)
def native(request):
    if request.param.startswith("Cosine"):
        pytest.importorskip("torchsde")
    return getattr(diffusers, request.param)(**CONFIGS.get(request.param, SD))


def equal(ours, theirs):
    return torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs


@pytest.mark.filterwarnings("ignore:Accessing config attribute:FutureWarning")
def test_tables_are_the_natives(native):
    """Before `set_timesteps` and after it; and what the native lacks is lacking, and said to be."""
    glass = GLASSScheduler.from_config({**native.config, "_class_name": type(native).__name__})
    for _ in range(2):
        for name in supported.NATIVE_READS:
            if name == "sigmas" and glass.num_inference_steps:
                continue  # our own, by then
            assert hasattr(glass, name) == hasattr(native, name), name
            if not hasattr(native, name):
                with pytest.raises(AttributeError, match=f"no attribute '{name}': its native {type(native).__name__}"):
                    getattr(glass, name)
            elif not callable(getattr(native, name)):
                assert equal(getattr(glass, name), getattr(native, name)), name
        glass.set_timesteps(7)
    assert len(glass.sigmas) == 8


def test_grids_of_training_are_the_natives(native):
    glass = GLASSScheduler.from_config({**native.config, "_class_name": type(native).__name__})
    if native.timesteps is not None:  # PNDM has none before
        assert torch.equal(glass.timesteps, native.timesteps)
    assert isinstance(glass.timesteps, torch.Tensor)
    if hasattr(native, "sigmas"):
        assert torch.equal(glass.sigmas, native.sigmas)
        glass.sigmas[0] = 7.0  # ours to write
        assert native.sigmas[0] != 7.0


def test_what_steps_the_native_is_not_there(native):
    """It would step an object that is not running; ChronoEdit's look at past outputs finds none."""
    glass = GLASSScheduler.from_scheduler(native)
    assert [name for name in RUN if hasattr(glass, name)] == ["model_outputs"]
    assert glass.model_outputs == ()
    assert not hasattr(glass, "_threshold_sample")
    assert not hasattr(glass, "_get_variance")
    assert not hasattr(glass, "_shift")


def test_what_hosts_ask_for_is_answered_by_ours(native):
    glass = GLASSScheduler.from_scheduler(native)
    for name in HOSTS_ASK:
        assert hasattr(glass, name)
        owner = getattr(getattr(glass, name), "__self__", glass)
        assert owner is glass
    assert all(glass.config[key] == value for key, value in native.config.items() if not key.startswith("_"))


def test_velocities_are_the_natives():
    z, noise = torch.randn(2, 2, 3, 6, 10, generator=tiny.seeded())
    t = torch.tensor([10, 700])
    native = DDPMScheduler(**SD)
    glass = GLASSScheduler.from_config(native.config, num_transitions=2)
    alpha, sigma = (one.sqrt().view(2, 1, 1, 1) for one in (native.alphas_cumprod[t], 1 - native.alphas_cumprod[t]))
    torch.testing.assert_close(glass.get_velocity(z, noise, t), alpha * noise - sigma * z)
    with pytest.raises(AttributeError, match="no attribute 'get_velocity': its native FlowMatchEulerDiscrete"):
        GLASSScheduler().get_velocity(z, noise, t)


def test_min_snr_weights_are_those_of_the_table():
    """As training scripts compute them: min(P, 5)/P, by a table that they index on their own."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    table = (1 - betas).cumprod(0)
    expected = (table / (1 - table)).clamp(max=5) / (table / (1 - table))
    glass = GLASSScheduler.from_config(DDIMScheduler(**SD).config)
    ratio = (glass.alphas_cumprod**0.5 / (1 - glass.alphas_cumprod) ** 0.5) ** 2
    torch.testing.assert_close((ratio.clamp(max=5) / ratio).double(), expected, rtol=1e-4, atol=0)


def test_sigmas_of_training_are_looked_up_by_timestep():
    """As in the training scripts of flow models: sigmas[timesteps == t], of the whole list."""
    glass = GLASSScheduler.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    for i in (0, 333, 999):
        t = glass.timesteps[i]
        (index,) = (glass.timesteps == t).nonzero()[0].tolist()
        straight = 1 - i / 1000
        assert float(glass.sigmas[index]) == pytest.approx(3 * straight / (1 + 2 * straight), rel=1e-5)
        assert float(t) == pytest.approx(1000 * float(glass.sigmas[index]), rel=1e-6)


def test_renewal_takes_the_table_of_the_scheduler():
    """As its docstring says."""
    glass = GLASSScheduler.from_config(DDIMScheduler(**SD).config)
    schedule = VariancePreserving(glass.alphas_cumprod)
    rule = renewal(0.5, schedule)
    t, then = 0.4, 0.6
    now, after = schedule.level(t), schedule.level(then)
    rho = rule(t, then)
    correlation = now.alpha * after.alpha + rho * now.sigma * after.sigma  # of x_t, x_t′ for standard Gaussian data
    assert 1 - correlation**2 == pytest.approx(0.5, abs=1e-9)


def test_self_attention_guidance_reads_the_table():
    pipe = tiny.sd(diffusers.StableDiffusionSAGPipeline)
    call = {"height": 16, "width": 24, "num_inference_steps": 4, "output_type": "np", "sag_scale": 0.7}
    native = pipe("a cat", generator=tiny.seeded(), **call).images
    pipe.scheduler = GLASSScheduler.from_config(pipe.scheduler.config, num_transitions=1, solver_order=1)
    np.testing.assert_allclose(pipe("a cat", generator=tiny.seeded(), **call).images, native, atol=2e-5)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("cls", [GLASSScheduler, GLASSFlowMatchScheduler], ids=lambda cls: cls.__name__)
def test_copies_read_their_own_native(cls, how):
    native = FlowMatchEulerDiscreteScheduler(shift=3.0)
    glass = cls.from_scheduler(native)
    other = copy.deepcopy(glass) if how == "deepcopy" else pickle.loads(pickle.dumps(glass))
    other.set_shift(5.0)
    assert (glass.shift, other.shift) == (3.0, 5.0)
    other.set_timesteps(4)
    assert other.timesteps[1] > glass.timesteps[250]
    assert type(other.config) is type(glass.config)
    assert other.config == glass.config


def test_an_object_that_is_not_built_has_no_attributes():
    """As pickle and copy make them: nothing is looked up on a native that is not there yet."""
    empty = object.__new__(GLASSScheduler)
    for name in ("alphas_cumprod", "sigmas", "_native", "__setstate__x", "does_not_exist"):
        with pytest.raises(AttributeError):
            getattr(empty, name)


def test_keys_of_the_config_are_still_deprecated_attributes():
    glass = GLASSScheduler.from_config(EulerDiscreteScheduler(**SD).config)
    with pytest.warns(FutureWarning, match="config attribute `beta_start` directly"):
        assert glass.beta_start == SD["beta_start"]
    with pytest.raises(AttributeError, match="^'GLASSScheduler' object has no attribute 'does_not_exist'$"):
        glass.does_not_exist  # noqa: B018


def test_a_table_on_its_own_is_finite_at_both_ends():
    glass = GLASSScheduler.from_config(DDIMScheduler(**SD).config)
    assert 0 < math.sqrt(float(glass.alphas_cumprod[-1])) < math.sqrt(float(glass.final_alpha_cumprod)) <= 1
