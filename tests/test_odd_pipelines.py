"""Two stages, two experts, two schedulers, mirrored rows: pipelines that do more than one loop over one batch."""

import copy
import functools

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", minversion="0.42")  # older ones build other pipelines

from diffusers import DDIMScheduler, FasterCacheConfig, LTX2Pipeline, TaylorSeerCacheConfig
from diffusers.hooks import apply_taylorseer_cache
from PIL import Image

import tiny
from glassflows import FeynmanKacSteerer, GLASSScheduler
from zoo import deepfloyd, ltx2, stable_diffusion_xl, transformers_2d, wan
from zoo.survey import cases

DDIM = {"beta_schedule": "scaled_linear", "clip_sample": False, "timestep_spacing": "trailing"}


def second(samples, prompts):
    """The second of two particles takes all."""
    return torch.tensor([0.0, 1.0])


def steered(pipe, call, **options):
    steerer = FeynmanKacSteerer(pipe, second, 2, reward_scale=1e4, ess_threshold=1.0, num_transitions=2, **options)
    return steerer(num_inference_steps=4, generator=tiny.seeded(), output_type="np", **call)


def predictions(monkeypatch):
    """Note (whether the scheduler has a hook of its own, rows of ẑ) at every step of every scheduler."""
    seen, step = [], GLASSScheduler.step

    @functools.wraps(step)
    def noting(self, *args, **kwargs):
        out = step(self, *args, **kwargs)
        seen.append((self, (out[1] if isinstance(out, tuple) else out.pred_original_sample).clone()))
        return out

    monkeypatch.setattr(GLASSScheduler, "step", noting)
    return seen


# ---- base and refiner ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cutoff", [0.3, 0.6])
def test_sdxl_base_and_refiner(cutoff):
    """One run over two pipelines: natively, by one transition of order 1, and by several."""
    base = stable_diffusion_xl.build("StableDiffusionXLPipeline")
    refiner = stable_diffusion_xl.build("StableDiffusionXLImg2ImgPipeline", **stable_diffusion_xl.REFINER)

    def run(make):
        base.scheduler, refiner.scheduler = make(), make()
        options = {"num_inference_steps": 10, "generator": tiny.seeded()}
        call = stable_diffusion_xl.text_to_image()
        latents = base(**options, **call, denoising_end=cutoff, output_type="latent").images
        calls = []
        hook = refiner.unet.register_forward_pre_hook(lambda *_: calls.append(1))
        call = stable_diffusion_xl.refiner() | {"image": latents, "denoising_start": cutoff}
        images = refiner(**options, **call, output_type="np").images
        hook.remove()
        return images, len(calls)

    def glass(**options):
        return run(lambda: GLASSScheduler.from_scheduler(DDIMScheduler(**DDIM), **options))

    (native, calls), (ode, ode_calls) = run(lambda: DDIMScheduler(**DDIM)), glass(num_transitions=1, solver_order=1)
    np.testing.assert_allclose(ode, native, atol=2e-5)
    ours, our_calls = glass(num_transitions=4)
    assert np.isfinite(ours).all()
    assert calls == ode_calls == our_calls == round(10 * (1 - cutoff))
    assert np.array_equal(ours, glass(num_transitions=4)[0])


# ---- two experts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", ["ddpm", -0.9])
def test_each_call_goes_to_the_expert_of_its_noise_level(correlation):
    """Also where t* comes back above the boundary after a transition that overshot it."""
    pipe = wan.two_experts()
    pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler, num_transitions=4, correlation=correlation)
    told = {"transformer": [], "transformer_2": []}
    for name, times in told.items():
        getattr(pipe, name).register_forward_pre_hook(
            lambda module, args, kwargs, times=times: times.append(float(kwargs["timestep"][0])), with_kwargs=True
        )
    pipe(num_inference_steps=12, generator=tiny.seeded(), output_type="np", **wan.two_experts_call())
    boundary = 1000 * pipe.config.boundary_ratio
    times = [float(t) for t in pipe.scheduler.timesteps]
    assert (times == sorted(times, reverse=True)) == (correlation == "ddpm")
    assert sorted(set(told["transformer"])) == sorted({t for t in times if t >= boundary})
    assert sorted(set(told["transformer_2"])) == sorted({t for t in times if t < boundary})


# ---- two schedulers --------------------------------------------------------------------------------------------------


def test_a_copy_of_the_scheduler_follows_its_resampling(monkeypatch):
    """LTX-2 samples sound beside the video with a copy: after resampling both go on from the same particle."""
    seen = predictions(monkeypatch)
    pipe = ltx2.build("LTX2Pipeline")
    steered(pipe, ltx2.call())
    leader = seen[0][0]
    video = [rows for scheduler, rows in seen if scheduler is leader]
    sound = [rows for scheduler, rows in seen if scheduler is not leader]
    assert len(video) == len(sound) == 4
    for stream in (video, sound):
        assert not torch.equal(stream[0][0], stream[0][1])
        assert torch.equal(stream[2][0], stream[2][1])  # the second transition begins: both slots hold one particle
        assert not torch.equal(stream[3][0], stream[3][1])  # and part ways


def test_a_copy_that_steps_first_is_refused():
    class SoundFirst(LTX2Pipeline):
        """Steps its copy before the scheduler it was copied from."""

        def prepare_audio_latents(self, *args, **kwargs):
            scheduler = copy.deepcopy(self.scheduler)
            scheduler.set_timesteps(4, mu=1.0)
            scheduler.step(torch.zeros(2, 3), scheduler.timesteps[0], torch.ones(2, 3))

    pipe = SoundFirst(**ltx2.build("LTX2Pipeline").components)
    with pytest.raises(ValueError, match="SoundFirst cannot be steered: a copy of its scheduler steps first"):
        steered(pipe, ltx2.call())


def test_a_scheduler_of_its_own_for_sound_is_refused():
    pipe = ltx2.build("LTX2ConditionPipeline")
    pipe.audio_scheduler = copy.deepcopy(pipe.scheduler)
    with pytest.raises(ValueError, match="leave out the component audio_scheduler"):
        FeynmanKacSteerer(pipe, second)


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_mirrored_rows_move_with_their_particles(monkeypatch):
    """DiT doubles its batch for guidance: two particles are four rows, and no four particles."""
    seen = predictions(monkeypatch)
    out = steered(transformers_2d.dit(), {"class_labels": [7], "guidance_scale": 4.0})
    assert [len(rows) for _, rows in seen] == [4] * 4
    resampled = seen[2][1]
    assert all(torch.equal(row, resampled[0]) for row in resampled)
    assert out.images.shape == (2, 16, 16, 3)
    assert not np.array_equal(out.images[0], out.images[1])


def test_each_class_has_its_own_particles():
    """Two classes, one of which is always worth the same: it is never resampled."""
    pipe = transformers_2d.dit()

    def reward(images, prompts):
        assert prompts == [None] * 6
        return torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 2.0])

    steerer = FeynmanKacSteerer(pipe, reward, 3, reward_scale=1e4, num_transitions=3)
    out = steerer(class_labels=[7, 2], num_inference_steps=6, generator=tiny.seeded(), output_type="np")
    assert out.images.shape == (6, 16, 16, 3)
    assert out.ancestors[:, 0].tolist() == [[0, 1, 2]] * 2
    assert out.ancestors[:, 1].tolist() == [[2, 2, 2]] * 2


@pytest.mark.parametrize("make", [tiny.sd_img2img, tiny.flux_img2img])
def test_each_prompt_keeps_its_own_image(make, monkeypatch):
    """Two prompts with an image each: the particles of a prompt all start from its image."""
    pipe, encoded, add_noise = make(), [], GLASSScheduler.add_noise

    def noting(self, original_samples, noise, timesteps):
        encoded.append(original_samples)
        return add_noise(self, original_samples, noise, timesteps)

    monkeypatch.setattr(GLASSScheduler, "add_noise", noting)
    images = torch.stack([torch.rand(3, 16, 24, generator=tiny.seeded(seed)) ** seed for seed in (1, 9)])
    with torch.no_grad():
        own = pipe.vae.encode(2 * images - 1).latent_dist.mode() - (pipe.vae.config.shift_factor or 0.0)
    size = tiny.FLUX_CALL if make is tiny.flux_img2img else tiny.SD_CALL
    steerer = FeynmanKacSteerer(pipe, lambda samples, prompts: torch.zeros(6), 3, num_transitions=2)
    steerer(["a cat", "a dog"], image=images, strength=0.5, num_inference_steps=6, generator=tiny.seeded(), **size)
    rows = encoded[0] / pipe.vae.config.scaling_factor
    distances = (rows[:, None] - own).square().mean((2, 3, 4))
    assert distances.argmin(1).tolist() == [0, 0, 0, 1, 1, 1]


# ---- state outside the scheduler -------------------------------------------------------------------------------------


def test_caches_of_features_are_refused():
    pipe = tiny.flux()
    pipe.transformer.enable_cache(
        FasterCacheConfig(current_timestep_callback=lambda: 500, is_guidance_distilled=True, tensor_format="BCHW")
    )
    with pytest.raises(ValueError, match=r"transformer caches features .*: call pipe\.transformer\.disable_cache"):
        FeynmanKacSteerer(pipe, second)
    pipe.transformer.disable_cache()
    FeynmanKacSteerer(pipe, second)
    apply_taylorseer_cache(pipe.transformer, TaylorSeerCacheConfig())  # as diffusers allows for any model
    with pytest.raises(ValueError, match="transformer caches features of each row"):
        FeynmanKacSteerer(pipe, second)


def test_momentum_of_guiders_is_refused_until_it_is_off():
    pipe = cases()["HunyuanImagePipeline"].build()
    with pytest.raises(ValueError, match=r"its guider keeps a momentum .*: set pipe\.guider\.adaptive_pro"):
        FeynmanKacSteerer(pipe, second)
    pipe.guider.adaptive_projected_guidance_momentum = None
    FeynmanKacSteerer(pipe, second)
    pipe.ocr_guider = copy.deepcopy(pipe.guider)
    pipe.ocr_guider.adaptive_projected_guidance_momentum = -0.5
    with pytest.raises(ValueError, match="its ocr_guider keeps a momentum"):
        FeynmanKacSteerer(pipe, second)


def test_pipelines_that_run_twice_are_refused():
    """Told by what they do, where the class is not known: AnimateDiff with FreeInit runs its loop several times."""
    case = cases()["AnimateDiffPipeline"]
    pipe = case.build()
    pipe.enable_free_init(num_iters=2)
    native = pipe.scheduler
    with pytest.raises(ValueError, match="AnimateDiffPipeline cannot be steered: it runs its scheduler more than once"):
        steered(pipe, case.call())
    assert pipe.scheduler is native
    assert "prepare_latents" not in vars(pipe)


def test_distilled_networks_are_refused():
    pipe = cases()["HunyuanImagePipeline"].build()
    pipe.guider.adaptive_projected_guidance_momentum = None
    pipe.transformer.register_to_config(use_meanflow=True)
    with pytest.raises(ValueError, match=r"transformer was distilled to jump \(mean flow\)"):
        FeynmanKacSteerer(pipe, second)


def test_initial_noise_of_another_scale_is_noticed():
    """PRX-Pixel starts from twice the noise, which only its pipeline knows."""
    case = cases()["PRXPixelPipeline"]
    pipe = case.build()
    pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler)
    for generator in (None, tiny.seeded(1)):
        pipe.scheduler.set_generator(generator)
        with pytest.raises(ValueError, match="expected initial noise of standard deviation 1, got 2.*pass noise_scale"):
            pipe(num_inference_steps=3, generator=tiny.seeded(), **case.call())


def test_a_scaled_noise_has_the_models_law():
    """x_t = t z + 2 (1 − t) ε with z ~ N(0, 1): chains keep the variance of the data."""
    for num_transitions in (1, 5, 40):
        scheduler = GLASSScheduler(num_transitions=num_transitions, noise_scale=2.0)
        scheduler.set_timesteps(40, sigmas=np.linspace(1, 1 / 40, 40))
        x = 2 * torch.randn(5000, 1, generator=tiny.seeded())
        for t in scheduler.timesteps:
            s = float(t) / 1000
            z = (1 - s) * x / ((1 - s) ** 2 + 4 * s**2)
            x = scheduler.step((x - z) / s, t, x).prev_sample
        assert abs(float(x.std()) - 1) < 0.08, num_transitions


def test_deepfloyd_prompts_need_no_autoencoder():
    """A pixel-space pipeline is steered on its own pixels."""
    out = steered(deepfloyd.CASES[0].build(), deepfloyd.CASES[0].call())
    assert out.images.shape == (2, 16, 24, 3)


def test_modular_pipelines_are_refused():
    from diffusers.modular_pipelines import FluxAutoBlocks

    with pytest.raises(ValueError, match="FluxModularPipeline cannot be steered: modular pipelines have a call of the"):
        FeynmanKacSteerer(FluxAutoBlocks().init_pipeline(), second)


# ---- images for each sample, references for all ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["StableVideoDiffusionPipeline", "StableDiffusionImageVariationPipeline"])
def test_images_without_prompts_are_groups(name):
    """Another second image changes the second group, and that alone."""
    case = cases()[name]
    call = {**case.call(), "output_type": "np", "num_inference_steps": 4}
    call.pop("decode_chunk_size", None)  # diffusers' chunks of frames may hold those of two videos
    image, outputs = call.pop("image"), []
    is_tensor = isinstance(image, torch.Tensor)
    values = (0.0, 1.0, 0.5)
    one, *others = (
        [torch.full_like(image, value) for value in values]
        if is_tensor
        else [Image.new("RGB", image.size, (int(255 * value),) * 3) for value in values]
    )
    for other in others:
        steerer = FeynmanKacSteerer(case.build(), indifferent, 3, num_transitions=2)
        both = torch.cat([one, other]) if is_tensor else [one, other]
        out = steerer(image=both, generator=tiny.seeded(), **call)
        assert out.rewards.shape == (2, 3)
        outputs.append(np.asarray(out.images))
    np.testing.assert_allclose(outputs[0][:3], outputs[1][:3], atol=1e-5)
    assert np.abs(outputs[0][3:] - outputs[1][3:]).max() > 1e-4


def indifferent(samples, prompts):
    return torch.zeros(len(samples))


@pytest.mark.parametrize(("prompts", "references"), [(1, 1), (1, 2), (2, 2), (2, 1)])
def test_reference_images_are_for_all_prompts(prompts, references):
    """FLUX.2 sees as many tokens of them as without steering."""
    case = cases()["Flux2Pipeline"]
    pipe, call, seen = case.build(), case.call(), []
    for name in ("image", "prompt_embeds", "output_type"):
        call.pop(name, None)
    call["image"] = [Image.new("RGB", (64, 64), colour) for colour in ("black", "white")][:references]
    call["prompt_embeds"] = torch.randn(prompts, 8, 16, generator=tiny.seeded())
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].shape), with_kwargs=True
    )
    pipe(num_inference_steps=2, generator=tiny.seeded(), **call)
    FeynmanKacSteerer(pipe, indifferent, 3, num_transitions=2)(num_inference_steps=2, generator=tiny.seeded(), **call)
    assert seen[0][1:] == seen[-1][1:]
    assert (len(seen[0]), seen[-1][0]) == (3, 3 * prompts)


def test_sound_comes_with_its_video():
    """LTX-2's, of the same particle as the frames."""
    pipe, call = cases()["LTX2Pipeline"].build(), ltx2.call() | {"num_inference_steps": 4, "output_type": "np"}
    steerer = FeynmanKacSteerer(pipe, lambda videos, prompts: [0.0, 1.0, 2.0], 3, num_transitions=2, ess_threshold=0)
    out = steerer(generator=tiny.seeded(), **call)
    pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler, num_transitions=2)
    embeds = {name: torch.cat([value] * 3) for name, value in call.items() if "embeds" in name or "mask" in name}
    plain = pipe(generator=tiny.seeded(), **(call | embeds))
    np.testing.assert_allclose(out.frames, plain.frames[[2, 1, 0]], atol=1e-4)
    np.testing.assert_allclose(np.asarray(out.audios), np.asarray(plain.audio)[[2, 1, 0]], atol=1e-4)


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
        pipe = tiny.sd(scheduler=scheduler)
        options = {"num_inference_steps": 5, "generator": tiny.seeded(), "output_type": "np"}
        images.append(pipe("a cat", **options, **tiny.SD_CALL).images)
    np.testing.assert_allclose(*images, atol=1e-5)
    assert pipe.scheduler.timesteps[-1] == 1
    made_anew = GLASSScheduler.from_config(pipe.scheduler.config)
    assert made_anew.config["native"]["steps_offset"] == 1
    assert made_anew.config["glass"]["num_transitions"] == 1


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
