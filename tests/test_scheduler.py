"""GLASSScheduler in real pipelines at toy size."""

import copy
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from diffusers.utils.torch_utils import randn_tensor

import tiny
from glassflows import GLASSScheduler, VariancePreserving, renewal, sample
from glassflows.scheduler import TransitionHook
from oracles import reference

SD = {key: value for key, value in tiny.SD_SCHEDULER.items() if key.startswith("beta")} | {"steps_offset": 1}
NATIVES = {
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow_inverted": FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    "flow_karras": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
    "ddim": DDIMScheduler(**tiny.SD_SCHEDULER),
    "ddim_zero_snr": DDIMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    ),
    "ddpm": DDPMScheduler(prediction_type="sample", clip_sample=False),
    "pndm": PNDMScheduler(skip_prk_steps=True, **SD),
    "euler": EulerDiscreteScheduler(**SD),
    "euler_karras": EulerDiscreteScheduler(use_karras_sigmas=True, prediction_type="v_prediction", **SD),
    "dpm": DPMSolverMultistepScheduler(**SD),
    "dpm_flow": DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
}


def run(pipe, seed=0, steps=6, **kwargs):
    call = tiny.FLUX_CALL if "Flux" in type(pipe).__name__ else tiny.SD_CALL
    if "generator" not in kwargs:
        kwargs["generator"] = tiny.seeded(seed)
    return pipe("a cat", num_inference_steps=steps, **({"output_type": "np"} | call | kwargs)).images


# ---- construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NATIVES)
def test_every_way_of_construction_agrees(name, tmp_path):
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


@pytest.mark.parametrize("name", NATIVES)
def test_native_keys_survive_both_ways(name):
    native = NATIVES[name]
    glass = GLASSScheduler.from_config(native.config)
    own = {key: value for key, value in native.config.items() if not key.startswith("_")}
    assert {key: glass.config[key] for key in own} == own
    back = type(native).from_config(glass.config)
    assert {key: back.config[key] for key in own} == own


def test_saved_config_of_another_class_is_used_by_name(tmp_path):
    NATIVES["ddim"].save_pretrained(tmp_path)
    config = DDIMScheduler.load_config(tmp_path)
    assert GLASSScheduler.from_config(config).config["native"]["_class_name"] == "DDIMScheduler"


def test_refusals():
    with pytest.raises(ValueError, match="got LCMScheduler, which has no GLASS counterpart: its network was distilled"):
        GLASSScheduler.from_scheduler(LCMScheduler())
    with pytest.raises(ValueError, match="from_scheduler"):
        GLASSScheduler.from_config({"num_train_timesteps": 1000})
    with pytest.raises(TypeError, match="unknown option num_transition;"):
        GLASSScheduler.from_config(NATIVES["flow"].config, num_transition=4)
    with pytest.raises(TypeError, match=r"pass pipe\.scheduler\.config"):
        GLASSScheduler.from_config("folder")
    with pytest.raises(ValueError, match="num_transitions: expected at least 1, got 0"):
        GLASSScheduler(num_transitions=0)
    for number in (2.5, True, "3"):
        with pytest.raises(ValueError, match="num_transitions: expected at least 1, got"):
            GLASSScheduler(num_transitions=number)
    with pytest.raises(ValueError, match="noise_scale: expected a positive number"):
        GLASSScheduler(noise_scale=0)
    with pytest.raises(TypeError, match=r"config: expected a scheduler's config, got DDIMScheduler: pass pipe"):
        GLASSScheduler.from_config(NATIVES["ddim"])
    with pytest.raises(TypeError, match=r"scheduler: expected pipe\.scheduler, got NoneType"):
        GLASSScheduler.from_scheduler(None)
    with pytest.raises(ValueError, match="correlation: expected"):
        GLASSScheduler(correlation=2.0)
    with pytest.raises(ValueError, match="prediction_type: expected one of .* got 'flow_prediction'"):
        GLASSScheduler.from_scheduler(DPMSolverMultistepScheduler(prediction_type="flow_prediction"))
    with pytest.raises(ValueError, match="DDIMScheduler takes no sigmas"):
        GLASSScheduler.from_scheduler(NATIVES["ddim"]).set_timesteps(sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="call set_timesteps first"):
        GLASSScheduler().step(torch.zeros(1, 2), 0, torch.zeros(1, 2))


def test_native_keys_can_be_overridden():
    glass = GLASSScheduler.from_config(NATIVES["flow"].config, shift=1.0)
    glass.set_timesteps(4, sigmas=[1.0, 0.75, 0.5, 0.25])
    assert glass.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_pipeline_saves_and_loads_with_the_scheduler(tmp_path):
    pipe = tiny.flux()
    pipe.scheduler = GLASSScheduler.from_config(pipe.scheduler.config, num_transitions=3)
    expected = run(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.scheduler, GLASSScheduler)
    np.testing.assert_allclose(run(loaded), expected, atol=1e-5)


# ---- what it samples -------------------------------------------------------------------------------------------------


def test_one_transition_is_flow_match_euler():
    pipe = tiny.flux()
    native = run(pipe)
    pipe.scheduler = GLASSScheduler.from_config(pipe.scheduler.config, num_transitions=1, solver_order=1)
    np.testing.assert_allclose(run(pipe), native, atol=2e-6)


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "dpm"])
def test_one_transition_is_the_native_ode(name):
    """DDIM with η = 0 on the grid of each native, which is Euler's method of the probability flow."""
    pipe = tiny.sd(scheduler=copy.deepcopy(NATIVES[name]))
    pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler, num_transitions=1, solver_order=1)
    images = run(pipe, steps=5)
    if name == "euler":  # first-order native on the same grid; it scales the initial noise by σ_max instead
        pipe.scheduler = EulerDiscreteScheduler.from_config(NATIVES[name].config)
        np.testing.assert_allclose(images, run(pipe, steps=5), atol=2e-3)
    if name == "ddim":
        pipe.scheduler = DDIMScheduler.from_config(NATIVES[name].config)
        np.testing.assert_allclose(images, run(pipe, steps=5), atol=2e-6)
    if name == "dpm":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(NATIVES[name].config, solver_order=1)
        np.testing.assert_allclose(images, run(pipe, steps=5), atol=2e-5)
    if name == "pndm":
        pipe.scheduler = DDIMScheduler(**tiny.SD_SCHEDULER)
        np.testing.assert_allclose(images, run(pipe, steps=5), atol=2e-6)


@pytest.mark.parametrize("native", [NATIVES["ddim"], DDIMScheduler(clip_sample=True, set_alpha_to_one=True)])
def test_one_call_per_transition_is_ddim_with_eta_one(native):
    """η = 0 in the first step and 1 afterwards, fed the same noises, on a real UNet."""
    unet = tiny.sd().unet
    generator = tiny.seeded()
    x = torch.randn(5, 4, 8, 12, generator=generator)
    text = torch.randn(5, 3, 16, generator=generator)
    glass = GLASSScheduler.from_scheduler(native, num_transitions=8)
    glass.set_timesteps(8)
    glass.set_generator(tiny.seeded(1))
    ddim = copy.deepcopy(native)
    ddim.set_timesteps(8)
    noises = tiny.seeded(1)
    ours, theirs = x, x
    with torch.no_grad():
        for i, t in enumerate(glass.timesteps):
            ours = glass.step(unet(ours, t, text).sample, t, ours).prev_sample
            noise = randn_tensor(x.shape, generator=noises) if i else None
            theirs = ddim.step(
                unet(theirs, t, text).sample, t, theirs, eta=float(i > 0), variance_noise=noise,
                use_clipped_model_output=native.config.clip_sample,  # so that DDIM's ε agrees with its clipped ẑ
            )[0]  # fmt: skip
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


CASES = [
    {"num_transitions": 4},
    {"num_transitions": 4, "solver_order": 1},
    {"num_transitions": 4, "corrector": False},
    {"num_transitions": 4, "correlation": 0.1},
    {"num_transitions": 3, "inner_grid": "condot"},
    {"num_transitions": 20},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_scheduler_is_sample_inside_out(options):
    law, _ = reference()
    scheduler = GLASSScheduler(**options)
    scheduler.set_timesteps(13, sigmas=np.linspace(1, 1 / 13, 13))
    scheduler.set_generator(tiny.seeded(1))
    x = torch.randn(5, 3, generator=tiny.seeded())
    noises = tiny.seeded(1)
    count = min(options["num_transitions"], 13) - 1
    expected = sample(
        law,
        x.double(),
        num_steps=13,
        noises=[torch.randn(5, 3, generator=noises).double() for _ in range(count)],
        **options,
    )
    for t in scheduler.timesteps:
        level = 1 - float(t) / 1000
        velocity = (x.double() - law(x.double(), level)) / (1 - level)
        x = scheduler.step(velocity.float(), t, x).prev_sample
    torch.testing.assert_close(x, expected.float(), rtol=0, atol=5e-5)


def test_variance_preserving_chain_is_sample_inside_out():
    law, _ = reference()
    native = DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing")
    schedule = VariancePreserving(native.alphas_cumprod.double())
    law = type(law)(law.means, law.weights, law.std, schedule)
    for options in CASES:
        scheduler = GLASSScheduler.from_scheduler(native, **options)
        scheduler.set_timesteps(10)
        scheduler.set_generator(tiny.seeded(1))
        x = torch.randn(5, 3, generator=tiny.seeded())
        times = [1 - (float(t) + 1) / 1000 for t in native_times(native, 10)] + [1.0]
        noises = tiny.seeded(1)
        count = min(options["num_transitions"], 10) - 1
        expected = sample(
            law, x.double(), num_steps=10, times=times, schedule=schedule,
            noises=[torch.randn(5, 3, generator=noises).double() for _ in range(count)], **options,
        )  # fmt: skip
        for t in scheduler.timesteps:
            x = scheduler.step(law(x.double(), 1 - (float(t) + 1) / 1000).float(), t, x).prev_sample
        torch.testing.assert_close(x, expected.float(), rtol=0, atol=1e-3 if "correlation" in options else 5e-5)


def native_times(native, steps):
    native = copy.deepcopy(native)
    native.set_timesteps(steps)
    return native.timesteps


def test_output_is_the_denoised_prediction():
    scheduler = GLASSScheduler(num_transitions=2)
    scheduler.set_timesteps(4, sigmas=[1.0, 0.75, 0.5, 0.25])
    x, v = torch.randn(2, 5, 3, generator=tiny.seeded())
    out = scheduler.step(v, scheduler.timesteps[0], x)
    torch.testing.assert_close(out.pred_original_sample, x - v)
    again = scheduler.step(v, scheduler.timesteps[1], out.prev_sample, return_dict=False)
    assert isinstance(again, tuple)
    torch.testing.assert_close(again[1], out.prev_sample - 0.75 * v)


# ---- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.flux, tiny.sd])
def test_the_pipelines_generator_reproduces(make):
    pipe = make()
    pipe.scheduler = GLASSScheduler.from_config(pipe.scheduler.config, num_transitions=3)
    images = [run(pipe, seed) for seed in (0, 0, 1)]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


@pytest.mark.parametrize("make", [tiny.flux, tiny.sd])
def test_given_latents_reproduce(make):
    """`latents=` without any generator: the noise in between follows from them, where no generator reaches `step`."""
    pipe = make()
    pipe.scheduler = GLASSScheduler.from_config(pipe.scheduler.config, num_transitions=3)
    shape = (2, 24, 16) if make is tiny.flux else (2, 4, 8, 12)
    latents = torch.randn(shape, generator=tiny.seeded())
    call = {"generator": None, "num_images_per_prompt": 2}
    both = run(pipe, latents=latents, **call)
    assert np.array_equal(both, run(pipe, latents=latents.clone(), **call))
    alone = run(pipe, latents=latents[1:], generator=None)
    np.testing.assert_allclose(alone[0], both[1], atol=2e-5)
    assert np.abs(both[0] - both[1]).max() > 1e-3


@pytest.mark.parametrize("make", [tiny.flux, tiny.sd])
def test_a_batch_equals_its_singles(make):
    pipe = make()
    pipe.scheduler = GLASSScheduler.from_config(pipe.scheduler.config, num_transitions=3)
    batch = run(pipe, num_images_per_prompt=3, generator=[tiny.seeded(s) for s in range(3)])
    for seed in range(3):
        np.testing.assert_allclose(run(pipe, generator=tiny.seeded(seed))[0], batch[seed], atol=2e-5)


def test_equal_latents_part_ways_at_the_first_boundary():
    pipe = tiny.flux()
    pipe.scheduler = GLASSScheduler.from_config(pipe.scheduler.config, num_transitions=2)
    seen = []
    run(
        pipe, num_images_per_prompt=2, generator=[tiny.seeded(0), tiny.seeded(0)],
        callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(kwargs["latents"]) or {},
    )  # fmt: skip
    assert [torch.equal(*latents) for latents in seen] == [True, True, True, False, False, False]


def test_noise_sources_in_order():
    scheduler = GLASSScheduler(num_transitions=2)
    x, v = torch.randn(2, 5, 3, generator=tiny.seeded())

    def last(own=None, given=None):
        scheduler.set_timesteps(4, sigmas=[1.0, 0.75, 0.5, 0.25])
        scheduler.set_generator(own)
        latents = x
        for t in scheduler.timesteps:
            latents = scheduler.step(0.3 * latents + v, t, latents, generator=given).prev_sample
        return latents

    assert torch.equal(last(), last())
    assert torch.equal(last(own=tiny.seeded(1)), last(given=tiny.seeded(1)))
    assert torch.equal(last(own=tiny.seeded(2), given=tiny.seeded(1)), last(given=tiny.seeded(1)))
    assert not torch.equal(last(), last(own=tiny.seeded(1)))
    assert torch.equal(last(given=[tiny.seeded(s) for s in range(5)]), last(own=[tiny.seeded(s) for s in range(5)]))


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


# ---- the host's habits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.flux_img2img, tiny.sd_img2img])
@pytest.mark.parametrize("strength", [0.4, 0.9])
def test_one_transition_is_the_native_ode_for_img2img(make, strength):
    pipe = make()
    image = torch.rand(1, 3, 16, 24, generator=tiny.seeded(3))
    native = run(pipe, steps=8, image=image, strength=strength)
    pipe.scheduler = GLASSScheduler.from_config(pipe.scheduler.config, num_transitions=1, solver_order=1)
    np.testing.assert_allclose(run(pipe, steps=8, image=image, strength=strength), native, atol=5e-6)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_img2img_runs_every_remaining_call(options):
    pipe = tiny.flux_img2img()
    pipe.scheduler = GLASSScheduler.from_config(pipe.scheduler.config, **options)
    image = torch.rand(1, 3, 16, 24, generator=tiny.seeded(3))
    images = [run(pipe, steps=8, image=image, strength=0.6) for _ in range(2)]
    assert np.array_equal(*images)
    assert pipe.scheduler.step_index == 8


def test_begin_index_is_found_from_the_first_timestep():
    x, v = torch.randn(2, 5, 3, generator=tiny.seeded())
    last = []
    for tell in (True, False):
        scheduler = GLASSScheduler(num_transitions=3)
        scheduler.set_timesteps(8, sigmas=np.linspace(1, 1 / 8, 8))
        if tell:
            scheduler.set_begin_index(3)
        latents = x
        for t in scheduler.timesteps[3:]:
            latents = scheduler.step(v, t, latents).prev_sample
        last.append(latents)
        with pytest.raises(ValueError, match="the run has ended"):
            scheduler.step(v, t, latents)
    assert torch.equal(*last)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(7)
    with pytest.raises(ValueError, match="set_begin_index: expected 0 to 3, got 7"):
        scheduler.step(v, scheduler.timesteps[0], x)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="is not in scheduler.timesteps"):
        scheduler.step(v, torch.tensor(123.4), x)


@pytest.mark.parametrize("name", ["flow", "ddim"])
def test_noising_is_the_natives_own(name):
    native = copy.deepcopy(NATIVES[name])
    native.set_timesteps(6)
    glass = GLASSScheduler.from_scheduler(native)
    glass.set_timesteps(6)
    z, noise = torch.randn(2, 3, 4, 6, 10, generator=tiny.seeded())
    t = glass.timesteps[torch.tensor([2, 2, 4])]
    expected = native.scale_noise(z, t, noise) if name == "flow" else native.add_noise(z, noise, t)
    torch.testing.assert_close(glass.scale_noise(z, t, noise), expected)
    torch.testing.assert_close(glass.add_noise(z, noise, t), expected)


def test_noising_off_the_grid():
    glass = GLASSScheduler.from_scheduler(NATIVES["ddim"])
    z, noise = torch.randn(2, 3, 4, generator=tiny.seeded())
    t = torch.tensor([999, 10, 0])
    torch.testing.assert_close(glass.add_noise(z, noise, t), NATIVES["ddim"].add_noise(z, noise, t))


def chain(edit=lambda i, x: x, *, begin=0, x=None, **options):
    """Run twelve calls on the reference mixture; `edit(i, latents)` acts before call i, as a callback would."""
    law, _ = reference()
    scheduler = GLASSScheduler(**options)
    scheduler.set_generator(tiny.seeded(1))
    scheduler.set_timesteps(12, sigmas=np.linspace(1, 1 / 12, 12))
    scheduler.set_begin_index(begin)
    x = torch.randn(5, 3, generator=tiny.seeded()) if x is None else x
    seen = []
    for i, t in enumerate(scheduler.timesteps[begin:], begin):
        x = edit(i, x)
        seen.append(x)
        level = 1 - float(t) / 1000
        velocity = (x.double() - law(x.double(), level)) / (1 - level)
        x = scheduler.step(velocity.float(), t, x).prev_sample
    return [*seen, x]


def test_lists_and_functions_of_correlation_are_those_of_sample():
    """The scheduler against `sample` with replayed noise, each transition with its own ρ."""
    law, _ = reference()
    x = torch.randn(5, 3, generator=tiny.seeded())
    noises = [torch.randn(5, 3, generator=generator) for generator in [tiny.seeded(1)] for _ in range(2)]
    for rho in ([0.9, 0.4, "ddpm"], lambda t, t_next: 0.5 * t_next, renewal(0.5)):
        expected = sample(
            law, x.double(),
            num_steps=12, num_transitions=3, correlation=rho, noises=[noise.double() for noise in noises],
        )  # fmt: skip
        torch.testing.assert_close(chain(num_transitions=3, correlation=rho)[-1].double(), expected, rtol=0, atol=1e-3)


def test_functions_of_correlation_survive_in_memory_and_are_asked_for_again_on_disk(tmp_path):
    rule = renewal(0.5)
    scheduler = GLASSScheduler(correlation=rule, num_transitions=3)
    assert "function" in str(scheduler)  # its config is still JSON
    for other in (copy.deepcopy(scheduler), GLASSScheduler.from_scheduler(scheduler)):
        other.set_timesteps(9)
        scheduler.set_timesteps(9)
        assert torch.equal(other.timesteps, scheduler.timesteps)
    scheduler.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="function of t and t′ .*pass it again"):
        GLASSScheduler.from_pretrained(tmp_path)
    again = GLASSScheduler.from_config(scheduler.config, correlation=rule)
    again.set_timesteps(9)
    assert torch.equal(again.timesteps, scheduler.timesteps)
    listed = GLASSScheduler(correlation=[0.0, 0.4, "ddpm"], num_transitions=3)
    listed.save_pretrained(tmp_path)
    assert GLASSScheduler.from_pretrained(tmp_path).config.correlation == [0.0, 0.4, "ddpm"]


def test_a_list_of_correlations_needs_one_per_transition():
    with pytest.raises(ValueError, match="expected one per transition, 4, got a list of 3"):
        GLASSScheduler(correlation=[0.0, 0.4, 0.4], num_transitions=4).set_timesteps(8)


def test_fractional_timesteps():
    """ρ_DDPM calls a table's network at its own integers; another ρ between them, which sinusoidal embeddings take."""
    sizes = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sinusoidal = UNet2DModel(**sizes, **blocks)
    learned = UNet2DModel(**sizes, **blocks, time_embedding_type="learned", num_train_timesteps=1000)
    x = torch.randn(2, 3, 8, 8, generator=tiny.seeded())
    native, other = (GLASSScheduler.from_scheduler(NATIVES["ddpm"], correlation=rho) for rho in ("ddpm", 0.4))
    native.set_timesteps(12)
    other.set_timesteps(12)
    assert native.timesteps.dtype == torch.int64
    assert (other.timesteps != other.timesteps.round()).any()
    with torch.no_grad():
        for t in (*native.timesteps, *other.timesteps):
            assert sinusoidal(x, t).sample.isfinite().all()
        for t in native.timesteps:
            assert learned(x, t.expand(2)).sample.isfinite().all()
        with pytest.raises(RuntimeError, match="Long, Int"):
            learned(x, other.timesteps[5].expand(2))


def test_untouched_latents_are_untouched():
    plain, copied = chain(num_transitions=3), chain(lambda i, x: x.clone(), num_transitions=3)
    assert all(torch.equal(a, b) for a, b in zip(plain, copied, strict=True))


@pytest.mark.parametrize("i", [4, 8])
def test_edits_at_a_boundary_replace_the_state(i):
    """Calls 4 and 8 begin transitions: given other latents there, a run goes on from them, whatever it was before."""
    given = torch.randn(5, 3, generator=tiny.seeded(7))

    def edited(seed):
        x = torch.randn(5, 3, generator=tiny.seeded(seed))
        return chain(lambda j, x: given if j == i else x, x=x, num_transitions=3)[-1]

    torch.testing.assert_close(edited(1), edited(2), rtol=0, atol=1e-5)


def test_edits_of_a_row_leave_the_others_their_history():
    def edit(j, x):
        return torch.cat([x[:2] + 0.3, x[2:]]) if j == 4 else x

    plain, edited = chain(num_transitions=3)[-1], chain(edit, num_transitions=3)[-1]
    assert torch.equal(plain[2:], edited[2:])
    assert (plain[:2] - edited[:2]).abs().min() > 1e-4


@pytest.mark.parametrize("rho", [1.0, -1.0, 0.9, -0.3, [0.5, "ddpm", "ddpm"]], ids=str)
@pytest.mark.parametrize("begin", range(12))
def test_runs_cut_anywhere_are_finite(rho, begin):
    """The rest of a cut transition may make its last call at its end or beyond."""
    start = torch.randn(5, 3, generator=tiny.seeded(7))
    cut_off = chain(begin=begin, x=start, num_transitions=3, correlation=rho)[-1]
    assert cut_off.isfinite().all()
    assert cut_off.abs().max() < 10


def test_edits_within_an_ode_replace_its_state():
    """One transition is the ODE: edited at call i, it goes on as the ODE begun there."""
    start = torch.randn(5, 3, generator=tiny.seeded(7))
    pasts = [
        chain(lambda i, x: start if i == 5 else x, num_transitions=1, x=torch.randn(5, 3, generator=tiny.seeded(seed)))
        for seed in (1, 2)
    ]
    torch.testing.assert_close(pasts[0][-1], pasts[1][-1], rtol=0, atol=1e-5)
    edited = chain(lambda i, x: start if i == 5 else x, num_transitions=1, solver_order=1)
    torch.testing.assert_close(
        edited[-1], chain(begin=5, x=start, num_transitions=1, solver_order=1)[-1], rtol=0, atol=1e-5
    )


def test_edits_within_a_transition_move_the_result():
    plain, edited = (chain(edit, num_transitions=3) for edit in (lambda i, x: x, lambda i, x: x + 0.1 * (i == 10)))
    assert (edited[-1] - plain[-1]).abs().min() > 1e-5


def test_in_place_writes_do_not_reach_the_state():
    scheduler = GLASSScheduler(num_transitions=2)
    other = GLASSScheduler(num_transitions=2)
    x, v = torch.randn(2, 5, 3, generator=tiny.seeded())
    a, b = x.clone(), x.clone()
    for one in (scheduler, other):
        one.set_timesteps(4, sigmas=[1.0, 0.75, 0.5, 0.25])
    for t in scheduler.timesteps:
        a = scheduler.step(v, t, a).prev_sample
        buffer = b  # as Kandinsky 5 does: latents[...] = step(...)
        buffer[...] = other.step(v, t, buffer).prev_sample
        b = buffer
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_latents_keep_their_dtype():
    scheduler = GLASSScheduler(num_transitions=2)
    scheduler.set_timesteps(4, sigmas=[1.0, 0.75, 0.5, 0.25])
    x = torch.randn(5, 3, generator=tiny.seeded())
    for t in scheduler.timesteps:
        out = scheduler.step(x.bfloat16(), t, x)
        x = out.prev_sample
        assert x.dtype == out.pred_original_sample.dtype == torch.float32


def test_a_learned_variance_is_dropped():
    glass = GLASSScheduler.from_scheduler(NATIVES["ddim"])
    glass.set_timesteps(4)
    x, v = torch.randn(2, 5, 3, 6, 10, generator=tiny.seeded())
    both = glass.step(torch.cat([v, 9 * v], 1), glass.timesteps[0], x).prev_sample
    glass.set_timesteps(4)
    assert torch.equal(both, glass.step(v, glass.timesteps[0], x).prev_sample)


def test_no_device_to_host_copy():
    """On the meta device every look at a value raises; told begin index and generator, even step one looks at none."""
    scheduler = GLASSScheduler(num_transitions=3)
    scheduler.set_timesteps(9, sigmas=np.linspace(1, 1 / 9, 9))
    scheduler.set_begin_index(0)
    scheduler.set_generator(tiny.seeded())
    x = torch.empty(5, 3, 6, 10, device="meta")
    for t in scheduler.timesteps.to("meta"):
        x = scheduler.step(torch.empty_like(x), t, x).prev_sample
    assert x.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation_after_the_first_step_on_a_gpu():
    scheduler = GLASSScheduler(num_transitions=3)
    scheduler.set_timesteps(9, "cuda", sigmas=np.linspace(1, 1 / 9, 9))
    scheduler.set_generator(torch.Generator("cuda").manual_seed(0))
    x = torch.randn(5, 3, 6, 10, generator=tiny.seeded()).cuda()
    for i, t in enumerate(scheduler.timesteps):
        torch.cuda.set_sync_debug_mode("error" if i else "default")
        try:
            x = scheduler.step(0.3 * x, t, x).prev_sample
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cpu_generator_draws_the_same_on_a_gpu():
    last = []
    for device in ("cpu", "cuda"):
        scheduler = GLASSScheduler(num_transitions=3)
        scheduler.set_timesteps(9, device, sigmas=np.linspace(1, 1 / 9, 9))
        x = torch.randn(5, 3, 6, 10, generator=tiny.seeded()).to(device)
        generator = tiny.seeded(1)
        for t in scheduler.timesteps:
            x = scheduler.step(0.3 * x, t, x, generator=generator).prev_sample
        last.append(x.cpu())
    torch.testing.assert_close(*last)


def test_hook_moves_state_and_prediction_together():
    """Resampled to row 2 everywhere, each slot goes on from row 2's x_t and ẑ with its own noise, by the equation."""
    scheduler = GLASSScheduler(num_transitions=2, solver_order=1)
    scheduler.set_timesteps(4, sigmas=[1.0, 0.75, 0.5, 0.25])
    x, v = torch.randn(2, 5, 3, generator=tiny.seeded())
    seen = []

    class Hook(TransitionHook):
        def at_boundary(self, at, x_t, z):
            seen.append(at)
            return torch.tensor([2, 2, 2, 2, 2]) if at.index == 1 else None

    scheduler.hook = Hook()
    scheduler.set_generator(tiny.seeded(1))
    for i, t in enumerate(scheduler.timesteps):
        out = scheduler.step(v, t, x)
        if i == 2:  # from σ = .5 to data; the next call lies at σ = .25
            x_t, z = x[2].expand(5, 3), (x - 0.5 * v)[2].expand(5, 3)
            lam = math.sqrt(3.0**2 - 1.0**2)  # (α/σ)² is 1 at σ = .5 and 9 at σ = .25
            e = torch.randn(5, 3, generator=tiny.seeded(1)) + lam * z
            expected = 0.25 * (x_t / 0.5 + lam * e) / 3
            torch.testing.assert_close(out.pred_original_sample, z)
            torch.testing.assert_close(out.prev_sample, expected)
        x = out.prev_sample
    assert [(at.index, at.total) for at in seen] == [(0, 2), (1, 2)]
    assert [at.level.sigma for at in seen] == [1.0, 0.5]


def test_handed_out_tensors_are_not_the_state():
    """Writing into what `step` returned, or into the network's output, changes nothing."""
    last = []
    for spoil in (False, True):
        scheduler = GLASSScheduler.from_scheduler(NATIVES["ddpm"], num_transitions=2)  # a network that predicts z
        scheduler.set_timesteps(6)
        scheduler.set_generator(tiny.seeded(1))
        x = torch.randn(5, 3, generator=tiny.seeded())
        for t in scheduler.timesteps:
            output = 0.3 * x
            out = scheduler.step(output, t, x)
            x = out.prev_sample.clone()
            if spoil:
                for tensor in (output, out.pred_original_sample, out.prev_sample):
                    tensor.fill_(7.0)
        last.append(x)
    assert torch.equal(*last)


@pytest.mark.parametrize("options", CASES[3:5], ids=str)
def test_a_cut_transition_is_the_ode_through_its_listed_times(options):
    """Begun inside a transition: Euler through the rest of its t* to its own end, written independently."""
    scheduler = GLASSScheduler(**options, solver_order=1)
    scheduler.set_timesteps(12, sigmas=np.linspace(1, 1 / 12, 12))
    size = 12 // options["num_transitions"]
    begin = size + 1  # the second call of the second transition
    scheduler.set_begin_index(begin)
    times = [1 - float(t) / 1000 for t in scheduler.timesteps[begin : 2 * size]] + [2 * size / 12]
    law, _ = reference()
    x = torch.randn(5, 3, generator=tiny.seeded())
    ours, expected = x, x.double()
    for t, now, then in zip(scheduler.timesteps[begin : 2 * size], times[:-1], times[1:], strict=True):
        velocity = (ours.double() - law(ours.double(), now)) / (1 - now)
        ours = scheduler.step(velocity.float(), t, ours).prev_sample
        expected = expected + (then - now) * (law(expected, now) - expected) / (1 - now)
    torch.testing.assert_close(ours, expected.float(), rtol=0, atol=2e-5)


# ---- from one scheduler to another and back --------------------------------------------------------------------------


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
