"""Pipelines that cannot be steered, told from what they are before a call, or from what they do in it."""

import copy

import pytest
from diffusers import DDIMScheduler, DiffusionPipeline

import tiny
from glassflows import FeynmanKacSteerer
from zoo import ltx2
from zoo.survey import cases


def steerer(pipe):
    return FeynmanKacSteerer(pipe, tiny.brightness)


def test_pipelines_that_hand_their_call_to_others():
    class Combined(DiffusionPipeline):
        def __init__(self, scheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)
            self.decoder_pipe = None

    class Unnamed(DiffusionPipeline):
        def __init__(self, decoder_scheduler):
            super().__init__()
            self.register_modules(decoder_scheduler=decoder_scheduler)

    with pytest.raises(ValueError, match=r"Combined .*: it hands its call to others: steer pipe\.decoder_pipe"):
        steerer(Combined(DDIMScheduler()))
    with pytest.raises(ValueError, match="Unnamed cannot be steered: it has no component named scheduler"):
        steerer(Unnamed(DDIMScheduler()))


@tiny.DIFFUSERS_42
def test_modular_pipelines():
    from diffusers.modular_pipelines import FluxAutoBlocks

    with pytest.raises(ValueError, match="FluxModularPipeline cannot be steered: modular pipelines have a call of the"):
        steerer(FluxAutoBlocks().init_pipeline())


@tiny.DIFFUSERS_42
def test_a_scheduler_of_its_own_for_sound():
    pipe = ltx2.build("LTX2ConditionPipeline")
    pipe.audio_scheduler = copy.deepcopy(pipe.scheduler)
    with pytest.raises(ValueError, match="LTX2ConditionPipeline .* leave out the component audio_scheduler"):
        steerer(pipe)


@tiny.DIFFUSERS_42
def test_caches_of_features():
    from diffusers import FasterCacheConfig, TaylorSeerCacheConfig
    from diffusers.hooks import apply_taylorseer_cache

    pipe = tiny.flux()
    pipe.transformer.enable_cache(
        FasterCacheConfig(current_timestep_callback=lambda: 500, is_guidance_distilled=True, tensor_format="BCHW")
    )
    caches = r"transformer caches features of each row: call pipe\.transformer\.disable_cache\(\)"
    with pytest.raises(ValueError, match=caches):
        steerer(pipe)
    pipe.transformer.disable_cache()
    steerer(pipe)
    apply_taylorseer_cache(pipe.transformer, TaylorSeerCacheConfig())  # as diffusers allows for any model
    with pytest.raises(ValueError, match=caches):
        steerer(pipe)


@tiny.DIFFUSERS_42
def test_momentum_of_guiders_until_it_is_off():
    pipe = cases()["HunyuanImagePipeline"].build()
    momentum = "adaptive_projected_guidance_momentum"
    with pytest.raises(
        ValueError, match=rf"its guider keeps a momentum of each row: set pipe\.guider\.{momentum}=None"
    ):
        steerer(pipe)
    pipe.guider.adaptive_projected_guidance_momentum = None
    steerer(pipe)
    pipe.ocr_guider = copy.deepcopy(pipe.guider)
    pipe.ocr_guider.adaptive_projected_guidance_momentum = -0.5
    with pytest.raises(ValueError, match="its ocr_guider keeps a momentum of each row"):
        steerer(pipe)


@tiny.DIFFUSERS_42
def test_distilled_networks():
    pipe = cases()["HunyuanImagePipeline"].build()
    pipe.guider.adaptive_projected_guidance_momentum = None
    pipe.transformer.register_to_config(use_meanflow=True)
    with pytest.raises(ValueError, match=r"transformer was distilled to jump \(mean flow\)"):
        steerer(pipe)


@pytest.mark.slow
@tiny.DIFFUSERS_42
def test_pipelines_that_run_twice():
    """Told by what they do, where the class is not known: AnimateDiff with FreeInit runs its loop several times."""
    case = cases()["AnimateDiffPipeline"]
    toy = tiny.Toy(case.build, case.call())
    toy.pipe.enable_free_init(num_iters=2)
    native = toy.pipe.scheduler
    with pytest.raises(ValueError, match="AnimateDiffPipeline cannot be steered: it runs its scheduler more than once"):
        toy.steer(**tiny.SECOND_TAKES_ALL)
    assert toy.pipe.scheduler is native
    assert "prepare_latents" not in vars(toy.pipe)
