"""GLASSScheduler: what it samples, what it hands out, and what it does not look at."""

import copy
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

import tiny
from chains import OPTIONS, chain, drive, glass
from glassflows import GLASSScheduler, VariancePreserving, renewal, sample
from glassflows.scheduler import TransitionHook
from oracles import gaussian, reference
from schedules import NATIVES

GRID = [1.0, 0.75, 0.5, 0.25]


# ---- what it samples -------------------------------------------------------------------------------------------------

FIRST_ORDER = {  # the native sampler that one transition of order 1 is, and how near it
    "ddim": (lambda config: DDIMScheduler.from_config(config), 2e-6),
    "pndm": (lambda config: DDIMScheduler(**tiny.SD_SCHEDULER), 2e-6),
    "dpm": (lambda config: DPMSolverMultistepScheduler.from_config(config, solver_order=1), 2e-5),
    "euler": (EulerDiscreteScheduler.from_config, 2e-3),  # it scales the initial noise by σ_max instead
}


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_one_transition_is_the_native_ode(name):
    """DDIM with η = 0 on the grid of each native, which is Euler's method of the probability flow."""
    toy = tiny.Toy(lambda: tiny.sd(scheduler=copy.deepcopy(NATIVES[name])), tiny.CALLS[tiny.sd])
    images = toy.glass(1, solver_order=1).run(num_inference_steps=5)
    make, tolerance = FIRST_ORDER[name]
    toy.pipe.scheduler = make(NATIVES[name].config)
    np.testing.assert_allclose(images, toy.run(num_inference_steps=5), atol=tolerance)


def test_one_transition_is_flow_match_euler(flux):
    native = flux.run()
    np.testing.assert_allclose(flux.glass(1, solver_order=1).run(), native, atol=2e-6)


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


def noises(number):
    """Return the noises that a scheduler draws which was given the generator of seed 1."""
    generator = tiny.seeded(1)
    return [torch.randn(5, 3, generator=generator).double() for _ in range(number)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_scheduler_is_sample_inside_out(options):
    law, _ = reference()
    x = torch.randn(5, 3, generator=tiny.seeded())
    given = noises(min(options["num_transitions"], 13) - 1)
    expected = sample(law, x.double(), num_steps=13, noises=given, **options)
    torch.testing.assert_close(drive(glass(13, **options), law, x)[-1], expected.float(), rtol=0, atol=5e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_variance_preserving_chain_is_sample_inside_out(options):
    native = DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing")
    schedule = VariancePreserving(native.alphas_cumprod.double())
    law, _ = reference()
    law = type(law)(law.means, law.weights, law.std, schedule)
    scheduler = GLASSScheduler.from_scheduler(native, **options)
    scheduler.set_timesteps(10)
    scheduler.set_generator(tiny.seeded(1))
    native.set_timesteps(10)
    times = [1 - (float(t) + 1) / 1000 for t in native.timesteps] + [1.0]
    x = torch.randn(5, 3, generator=tiny.seeded())
    given = noises(min(options["num_transitions"], 10) - 1)
    expected = sample(law, x.double(), num_steps=10, times=times, schedule=schedule, noises=given, **options)
    for t in scheduler.timesteps:
        x = scheduler.step(law(x.double(), 1 - (float(t) + 1) / 1000).float(), t, x).prev_sample
    torch.testing.assert_close(x, expected.float(), rtol=0, atol=1e-3 if "correlation" in options else 5e-5)


def test_lists_and_functions_of_correlation_are_those_of_sample():
    """The scheduler against `sample` with replayed noise, each transition with its own ρ."""
    law, _ = reference()
    x = torch.randn(5, 3, generator=tiny.seeded())
    for rho in ([0.9, 0.4, "ddpm"], lambda t, t_next: 0.5 * t_next, renewal(0.5)):
        expected = sample(law, x.double(), num_steps=12, num_transitions=3, correlation=rho, noises=noises(2))
        torch.testing.assert_close(chain(num_transitions=3, correlation=rho)[-1].double(), expected, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_a_scaled_noise_has_the_models_law():
    """x_t = t z + 2 (1 − t) ε with z ~ N(0, 1): chains keep the variance of the data."""
    for num_transitions in (1, 5, 40):
        scheduler = glass(40, num_transitions=num_transitions, noise_scale=2.0)
        scheduler.set_generator(None)
        x = 2 * torch.randn(5000, 1, generator=tiny.seeded())
        last = drive(scheduler, lambda x, t: gaussian(x, t, noise=2.0), x)[-1]
        assert abs(float(last.std()) - 1) < 0.08, num_transitions


# ---- what it hands out -----------------------------------------------------------------------------------------------


def test_output_is_the_denoised_prediction():
    scheduler = GLASSScheduler(num_transitions=2)
    scheduler.set_timesteps(4, sigmas=GRID)
    x, v = torch.randn(2, 5, 3, generator=tiny.seeded())
    out = scheduler.step(v, scheduler.timesteps[0], x)
    torch.testing.assert_close(out.pred_original_sample, x - v)
    again = scheduler.step(v, scheduler.timesteps[1], out.prev_sample, return_dict=False)
    assert isinstance(again, tuple)
    torch.testing.assert_close(again[1], out.prev_sample - 0.75 * v)


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


def test_latents_keep_their_dtype():
    scheduler = GLASSScheduler(num_transitions=2)
    scheduler.set_timesteps(4, sigmas=GRID)
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
        with pytest.raises(RuntimeError, match="following scalar types: Long, Int; but got torch.FloatTensor"):
            learned(x, other.timesteps[5].expand(2))


def test_hook_moves_state_and_prediction_together():
    """Resampled to row 2 everywhere, each slot goes on from row 2's x_t and ẑ with its own noise, by the equation."""
    scheduler = GLASSScheduler(num_transitions=2, solver_order=1)
    scheduler.set_timesteps(4, sigmas=GRID)
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


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_no_device_to_host_copy():
    """On the meta device every look at a value raises; told begin index and generator, even step one looks at none."""
    scheduler = glass(9, num_transitions=3)
    x = torch.empty(5, 3, 6, 10, device="meta")
    for t in scheduler.timesteps.to("meta"):
        x = scheduler.step(torch.empty_like(x), t, x).prev_sample
    assert x.device.type == "meta"


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
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


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"num_transitions": n}, f"^num_transitions: expected at least 1, got {n!r}$") for n in (0, 2.5, True, "3")),
        ({"noise_scale": 0}, "^noise_scale: expected a positive number, 1 where it is no flow, got 0$"),
        ({"correlation": 2.0}, r'^correlation: expected "ddpm" or a number in \[-1, 1\], got 2\.0, or a list'),
        ({"first_transition": "prior"}, r"^first_transition: expected one of \('ode', 'posterior'\), got 'prior'$"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GLASSScheduler(**options)


def test_a_list_of_correlations_needs_one_per_transition():
    with pytest.raises(ValueError, match="^correlation: expected one per transition, 4, got a list of 3"):
        GLASSScheduler(correlation=[0.0, 0.4, 0.4], num_transitions=4).set_timesteps(8)


def test_sigmas_where_the_native_takes_none():
    with pytest.raises(ValueError, match="^set_timesteps: DDIMScheduler takes no sigmas: leave them out"):
        GLASSScheduler.from_scheduler(NATIVES["ddim"]).set_timesteps(sigmas=[1.0, 0.5])


def test_steps_before_a_timetable():
    with pytest.raises(ValueError, match="^step: no timetable yet: call set_timesteps first$"):
        GLASSScheduler().step(torch.zeros(1, 2), 0, torch.zeros(1, 2))
