"""GLASSScheduler where the host runs its networks in another way: offloaded, quantised, adapted, compiled, shared."""

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", minversion="0.42")  # older ones build other pipelines

from accelerate import cpu_offload
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, FluxImg2ImgPipeline
from diffusers.hooks import apply_group_offloading
from diffusers.modular_pipelines import FluxAutoBlocks, StableDiffusionXLAutoBlocks
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import tiny
from glassflows import GLASSScheduler
from zoo import image
from zoo import stable_diffusion_xl as xl

CPU = torch.device("cpu")
PIPELINES = [tiny.flux, tiny.sd]
IMAGE = {"image": image(16, 24), "strength": 0.7}


def sdxl():
    """Return a pipeline whose text encoders have layers to skip."""
    pipe = xl.build("StableDiffusionXLPipeline", cross_attention_dim=32)
    encoder, tokenizer = tiny.clip_text()
    config = CLIPTextConfig(**(encoder.config.to_dict() | {"num_hidden_layers": 3}))
    torch.manual_seed(1)
    encoders = {
        "text_encoder": CLIPTextModel(config).eval(), "text_encoder_2": CLIPTextModelWithProjection(config).eval()
    }  # fmt: skip
    pipe.register_modules(tokenizer=tokenizer, tokenizer_2=tokenizer, **encoders)
    return pipe


def steered(toy):
    """Return the images of a steered call, which decodes between the network's calls."""
    return toy.steer(num_transitions=None, ess_threshold=1).images


def native(toy, **kwargs):
    """Return the images of a pipeline, having seen that GLASS with one transition of order 1 draws the same."""
    images = toy.run(**kwargs)
    np.testing.assert_allclose(toy.glass(1, solver_order=1).run(**kwargs), images, atol=2e-6)
    return images


def assert_differ(*images):
    """Check that no two of these are alike, by far more than rounding."""
    for i, a in enumerate(images):
        for b in images[:i]:
            assert np.abs(a - b).max() > 1e-3


# ---- offloading and placement ----------------------------------------------------------------------------------------


def modules(pipe):
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def offload_models(pipe, folder):
    pipe.enable_model_cpu_offload(device="cpu")


def offload_layers(pipe, folder):
    """What `enable_sequential_cpu_offload` does; itself it names the device "cpu:0", which accelerate trips over."""
    for part in modules(pipe).values():
        cpu_offload(part, CPU, offload_buffers=len(part._parameters) > 0)
        assert {weight.device.type for weight in part.parameters()} == {"meta"}


def offload_groups(pipe, folder):
    pipe.enable_group_offload(CPU, offload_type="leaf_level")


def offload_to_disk(pipe, folder):
    for name, part in modules(pipe).items():
        apply_group_offloading(
            part, CPU, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder / name)
        )
        assert list((folder / name).iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("offload", [offload_models, offload_layers, offload_groups, offload_to_disk])
def test_offloading(toy, offload, tmp_path):
    """With the CPU as the accelerator: the images of a pipeline in memory, again and steered too.

    But for rounding: weights read from a file may lie otherwise in memory, and sums with them.
    """
    plain = tiny.Toy(toy.make).glass()
    expected, by_reward = plain.run(), steered(plain)
    offload(toy.glass().pipe, tmp_path)
    np.testing.assert_allclose(toy.run(), expected, atol=2e-6)
    np.testing.assert_allclose(steered(toy), by_reward, atol=2e-6)
    np.testing.assert_allclose(toy.run(), expected, atol=2e-6)


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_device_map(toy, device_map, tmp_path):
    expected = toy.glass().run()
    toy.pipe.save_pretrained(tmp_path)
    toy.pipe = DiffusionPipeline.from_pretrained(tmp_path, device_map=device_map)
    toy.pipe.set_progress_bar_config(disable=True)
    assert type(toy.pipe.scheduler) is GLASSScheduler
    np.testing.assert_allclose(toy.run(), expected, atol=2e-6)


# ---- other networks --------------------------------------------------------------------------------------------------


def to_float8(toy):
    toy.network.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)


def to_int8(toy):
    """Quantise the linear layers, their inputs on the fly, by the one quantiser that torch itself brings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch refers to torchao for it
        quantised = torch.ao.quantization.quantize_dynamic(toy.network, {torch.nn.Linear})
    setattr(toy.pipe, toy.name_of_network, quantised)
    assert any(isinstance(part, torch.ao.nn.quantized.dynamic.Linear) for part in quantised.modules())


@pytest.mark.slow
@pytest.mark.parametrize("quantise", [to_float8, to_int8])
def test_quantised(toy, quantise):
    plain = toy.run()
    quantise(toy)
    assert_differ(native(toy), plain)


def lora(toy):
    """Return the state dict of a LoRA file for a pipeline."""
    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_v", "to_out.0"])
    toy.network.add_adapter(config)
    weights = get_peft_model_state_dict(toy.network)
    return {f"{toy.name_of_network}.{key}": value for key, value in weights.items()}


@pytest.mark.slow
@pytest.mark.parametrize("make", PIPELINES)
def test_lora(make):
    """As loaded, scaled in the call, scaled by `set_adapters`, fused; unloaded, it is the pipeline without it again."""
    scaled = {"joint_attention_kwargs" if make is tiny.flux else "cross_attention_kwargs": {"scale": 0.5}}
    weights, plain = lora(tiny.Toy(make)), tiny.Toy(make).run()

    def loaded():
        toy = tiny.Toy(make)
        toy.pipe.load_lora_weights(dict(weights), adapter_name="toy")
        return toy

    half = native(loaded(), **scaled)
    assert_differ(plain, half, native(loaded()))
    toy = loaded()
    toy.pipe.set_adapters(["toy"], [0.5])
    np.testing.assert_allclose(native(toy), half, atol=2e-6)
    toy = loaded()
    toy.pipe.fuse_lora(lora_scale=0.5)
    np.testing.assert_allclose(native(toy), half, atol=2e-6)
    toy.pipe.unfuse_lora()
    toy.pipe.unload_lora_weights()
    np.testing.assert_allclose(native(toy), plain, atol=1e-5)


def add_ip_adapter(pipe, scale):
    """Give a Stable Diffusion pipeline an IP-Adapter of random weights, without its image encoder."""
    generator, weights = tiny.seeded(5), {}
    for i, name in enumerate(name for name in pipe.unet.attn_processors if "attn2" in name):
        shape = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
        for side in "kv":
            weights[f"{2 * i + 1}.to_{side}_ip.weight"] = torch.randn(shape, generator=generator)
    projection = {"proj.weight": torch.randn(64, 16, generator=generator), "proj.bias": torch.zeros(64)}
    projection |= {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}
    adapter = {"image_proj": projection, "ip_adapter": weights}
    pipe.load_ip_adapter(adapter, subfolder=None, weight_name=None, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(scale)


def test_ip_adapter():
    embedded = {"ip_adapter_image_embeds": [torch.randn(2, 1, 1, 16, generator=tiny.seeded(6))]}
    images = [tiny.Toy(tiny.sd).run()]
    for scale in (0.5, 1.0):
        toy = tiny.Toy(tiny.sd)
        add_ip_adapter(toy.pipe, scale)
        images.append(native(toy, **embedded))
    assert_differ(*images)


@pytest.mark.slow
@pytest.mark.parametrize("make", PIPELINES)
def test_compiled(make):
    """GLASS hands a compiled network nothing that it has to be compiled for again: as often as with the native."""
    call = {"num_inference_steps": 10}
    expected = {1: tiny.Toy(make).run(**call), 5: tiny.Toy(make).glass(5).run(**call)}
    compilations = {}
    for num_transitions in expected:
        torch._dynamo.reset()
        graphs = []

        def backend(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        toy = tiny.Toy(make)
        setattr(toy.pipe, toy.name_of_network, torch.compile(toy.network, backend=backend))
        if num_transitions > 1:
            toy.glass(num_transitions)
        for _ in range(2):
            np.testing.assert_allclose(toy.run(**call), expected[num_transitions], atol=1e-5)
        compilations[num_transitions] = len(graphs)
    torch._dynamo.reset()
    assert compilations[1] == compilations[5] > 0


# ---- features of pipelines -------------------------------------------------------------------------------------------


def tile(pipe):
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 8  # smaller than the toy images


FEATURES = {
    "freeu": (tiny.sd, lambda pipe: pipe.enable_freeu(s1=0.5, s2=0.2, b1=1.5, b2=1.6), {}),
    "guidance_rescale": (tiny.sd, None, {"guidance_rescale": 0.7}),
    "guidance_scale_0": (tiny.sd, None, {"guidance_scale": 0}),
    "guidance_scale_1": (tiny.sd, None, {"guidance_scale": 1}),
    "true_cfg_scale": (tiny.flux, None, {"true_cfg_scale": 4.0, "negative_prompt": "a dog"}),
    "clip_skip": (sdxl, None, {"clip_skip": 1}),
    "tiling": (tiny.sd, tile, {}),
    "tiling_flux": (tiny.flux, tile, {}),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features(name):
    make, switch_on, arguments = FEATURES[name]
    toy = tiny.Toy(make, tiny.CALLS[tiny.flux if make is tiny.flux else tiny.sd])
    plain = toy.run()
    if switch_on:
        switch_on(toy.pipe)
    assert_differ(native(toy, **arguments), plain)


def test_vae_slicing(toy):
    """The same images, decoded one by one."""
    batches = []
    toy.pipe.vae.decoder.register_forward_hook(lambda _, latents, images: batches.append(len(images)))
    plain = toy.run(num_images_per_prompt=3)
    toy.pipe.vae.enable_slicing()
    np.testing.assert_allclose(native(toy, num_images_per_prompt=3), plain, atol=1e-5)
    assert batches == [3] + 6 * [1]


def slice_attention(toy):
    toy.pipe.enable_attention_slicing(1)
    assert {type(used).__name__ for used in toy.network.attn_processors.values()} == {"SlicedAttnProcessor"}


def fuse(toy):
    (toy.network if toy.make is tiny.flux else toy.pipe).fuse_qkv_projections()  # Flux: the network's only
    assert any(getattr(part, "fused_projections", False) for part in toy.network.modules())


@pytest.mark.parametrize(("make", "switch_on"), [(tiny.sd, slice_attention), (tiny.sd, fuse), (tiny.flux, fuse)])
def test_attention(make, switch_on):
    """The same images, by another way of computing them."""
    toy = tiny.Toy(make)
    plain = toy.run()
    switch_on(toy)
    np.testing.assert_allclose(native(toy), plain, atol=1e-5)


def test_interrupted(toy):
    """A callback's `pipe._interrupt` stops the network's calls; the next run is a whole one."""
    plain, calls = [], []
    expected = toy.glass().run(callback_on_step_end=lambda *args: plain.append(args[3]["latents"].clone()) or {})
    toy.network.register_forward_hook(lambda *_: calls.append(1))

    def interrupt(pipe, i, t, tensors):
        pipe._interrupt = i == 2
        return tensors

    stopped = toy.run(callback_on_step_end=interrupt, output_type="latent")
    assert len(calls) == 3
    assert torch.equal(stopped, plain[2])
    assert np.array_equal(toy.run(), expected)
    assert len(calls) == 3 + 6


# ---- pipelines of other kinds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_pipe", [FluxImg2ImgPipeline.from_pipe, AutoPipelineForImage2Image.from_pipe])
def test_shared_scheduler(flux, from_pipe):
    """Two pipelines around one scheduler object, used in turn, draw what pipelines of their own draw."""
    expected = flux.glass().run(), tiny.Toy(tiny.flux_img2img).glass().run()
    other = tiny.Toy(lambda: from_pipe(flux.pipe), tiny.CALLS[tiny.flux_img2img])
    other.pipe.set_progress_bar_config(disable=True)
    assert type(other.pipe) is FluxImg2ImgPipeline
    assert other.pipe.scheduler is flux.pipe.scheduler
    for _ in range(2):
        assert np.array_equal(flux.run(), expected[0])
        assert np.array_equal(other.run(), expected[1])


def modular_flux():
    pipe = FluxAutoBlocks().init_pipeline()
    pipe.update_components(**{name: part for name, part in tiny.flux().components.items() if part is not None})
    return pipe


def modular_sdxl():
    """Without text encoders, and with diffusers' own guider."""
    blocks = StableDiffusionXLAutoBlocks()
    blocks.sub_blocks.pop("text_encoder")
    pipe = blocks.init_pipeline()
    classic = xl.build("StableDiffusionXLPipeline")
    pipe.update_components(unet=classic.unet, vae=classic.vae, scheduler=classic.scheduler)
    return pipe


MODULAR = {
    "flux": (modular_flux, tiny.FLUX_CALL | {"prompt": "a cat"}),
    "flux_image": (modular_flux, IMAGE | {"prompt": "a cat", "image": image(16, 32), "height": 16, "width": 32}),
    "sdxl": (modular_sdxl, xl.text_to_image()),
    "sdxl_image": (modular_sdxl, xl.img2img()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULAR)
def test_modular(name):
    """As native with one transition of order 1; with more, the generator alone tells the images."""
    make, arguments = MODULAR[name]
    pipe = make()

    def images(seed=0, **options):
        if options:
            pipe.update_components(scheduler=GLASSScheduler.from_scheduler(pipe.scheduler, **options))
        given = {"generator": tiny.seeded(seed), "num_inference_steps": 6, "output_type": "np", "output": "images"}
        return pipe(**(arguments | given))

    expected = images()
    np.testing.assert_allclose(images(num_transitions=1, solver_order=1), expected, atol=2e-6)
    stochastic = images(num_transitions=3)
    assert np.array_equal(images(), stochastic)
    assert_differ(expected, stochastic, images(seed=1))
