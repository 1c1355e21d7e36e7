"""What prompts share or have each: images of several control networks and adapters, latents, cropped masks."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

pytest.importorskip("diffusers", minversion="0.42")  # older ones build other pipelines

import diffusers
from diffusers.models.controlnets.multicontrolnet_union import MultiControlNetUnionModel

import tiny
from glassflows.host.batch import lay_out
from test_network_rows import compare_runs
from test_rows import WARNINGS, assert_equal, drawn
from zoo import animatediff, image, noise
from zoo.survey import cases

pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(warning) for warning in WARNINGS)]

K = 3
SIDES = {"HunyuanDiTControlNetPipeline": (16, 16)}  # else (16, 24)

# ---- two networks ----------------------------------------------------------------------------------------------------


def doubled(label):
    """A pipeline of the zoo with its control network, or its adapter, twice, and a call of it."""
    case = cases()[label]
    pipe, call = case.build(), case.call()
    if hasattr(pipe, "adapter"):
        more = {"adapter": diffusers.MultiAdapter([pipe.adapter, pipe.adapter])}
    else:
        more = {"controlnet": [pipe.controlnet, pipe.controlnet]}
    if "Union" in label:
        more = {"controlnet": MultiControlNetUnionModel(more["controlnet"])}
    made = type(pipe)(**pipe.components | more, **text_options(pipe))
    made.set_progress_bar_config(disable=True)
    scale = f"{'adapter' if hasattr(pipe, 'adapter') else 'controlnet'}_conditioning_scale"
    return made, call | {scale: [0.5, 3.0]}


def text_options(pipe):
    return {"requires_safety_checker": False} if hasattr(pipe, "safety_checker") else {}


def embedded_twice(call):
    """The embeddings of two prompts in place of one's."""
    names = [name for name, value in call.items() if "embeds" in name and isinstance(value, torch.Tensor)]
    return {name: torch.cat([call[name], call[name].flip(-1)]) for name in names}


def of_one(both, j):
    return {name: value[j : j + 1] for name, value in both.items()}


def pictures(label, *seeds):
    """Images as PIL's, which differ."""
    tensors = [image(*SIDES.get(label, (16, 24)), seed=seed)[0] for seed in seeds]
    arrays = [(255 * tensor.movedim(0, -1)).byte().numpy() for tensor in tensors]
    return [Image.fromarray(array) for array in arrays]


def control(call):
    return "control_image" if "control_image" in call else "image"


PROMPTS_FIRST = ["StableDiffusionControlNetPipeline", "StableDiffusionControlNetPAGPipeline"]
NETWORKS_FIRST = [
    "FluxControlNetPipeline", "StableDiffusionAdapterPipeline",
    "StableDiffusionXLAdapterPipeline", "StableDiffusionXLControlNetUnionPipeline",
]  # fmt: skip


def compare(label, both, alone):
    """Compare two prompts with each of them alone; see that the images tell, and that one is for all.

    Args:
        label: Of the zoo.
        both: The control images of two prompts.
        alone: Those of each.
    """
    pipe, call = doubled(label)
    embeddings = embedded_twice(call)
    name = control(call)
    together = drawn(pipe, call | embeddings | {name: both}, K, generator=[tiny.seeded(0), tiny.seeded(1)])
    assert len(together) == 2 * K
    for j in (0, 1):
        ones = []
        for images in alone:
            pipe, call = doubled(label)
            given = call | of_one(embeddings, j) | {name: images}
            ones.append(drawn(pipe, given, K, generator=[tiny.seeded(j)]))
        assert_equal(together[j * K : (j + 1) * K], ones[j])
        assert (ones[0] - ones[1]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("label", PROMPTS_FIRST + NETWORKS_FIRST)
def test_each_prompt_has_an_image_for_each_network(label):
    """As lists in the order that the class takes them in: of prompts, or of networks."""
    a, b, c, d = pictures(label, 1, 2, 3, 4)  # the networks' of the first prompt, and of the second
    if label in PROMPTS_FIRST:
        compare(label, [[a, b], [c, d]], ([[a, b]], [[c, d]]))
    else:
        compare(label, [[a, c], [b, d]], ([[a], [b]], [[c], [d]]))


@pytest.mark.slow
@pytest.mark.parametrize("label", ["StableDiffusionControlNetPipeline", "StableDiffusionXLControlNetPipeline"])
def test_tensors_of_several_networks_have_a_row_for_each_prompt(label):
    first, second = (torch.cat([image(16, 24, seed=seed), image(16, 24, seed=seed + 2)]) for seed in (1, 2))
    compare(label, [first, second], ([first[:1], second[:1]], [first[1:], second[1:]]))


@pytest.mark.slow
@pytest.mark.parametrize("label", [*PROMPTS_FIRST, *NETWORKS_FIRST, "StableDiffusionXLControlNetPipeline"])
def test_one_image_for_each_network_is_for_all_prompts(label):
    pipe, call = doubled(label)
    embeddings = embedded_twice(call)
    given = {control(call): pictures(label, 1, 2)}
    together = drawn(pipe, call | embeddings | given, K, generator=[tiny.seeded(0), tiny.seeded(1)])
    for j in (0, 1):
        pipe, call = doubled(label)
        alone = drawn(pipe, call | of_one(embeddings, j) | given, K, generator=[tiny.seeded(j)])
        assert_equal(together[j * K : (j + 1) * K], alone)


@pytest.mark.parametrize("label", ["HunyuanDiTControlNetPipeline", "StableDiffusion3ControlNetPipeline"])
def test_rows_of_classes_that_encode_control_images_with_the_global_generator(label):
    """Their runs are not to be compared."""
    pipe, call = doubled(label)
    a, b, c, d = pictures("", 1, 2, 3, 4)
    given = call | embedded_twice(call)
    assert lay_out(pipe, given | {"control_image": [[a, c], [b, d]]}, 2).arguments["control_image"] == [
        [a, a, c, c], [b, b, d, d]
    ]  # fmt: skip
    assert lay_out(pipe, given | {"control_image": [a, b]}, 2).arguments["control_image"] == [a, b]


VIDEOS = ["AnimateDiffControlNetPipeline", "AnimateDiffVideoToVideoControlNetPipeline"]


@pytest.mark.slow
@pytest.mark.parametrize("label", VIDEOS)
def test_several_networks_of_videos(label):
    """A list of frames for each, for all prompts; the second matters, and the networks may see a part of the rows."""
    films = [animatediff.conditions()["conditioning_frames"], [frame[0] for frame in animatediff.frames(20)]]
    pipe, call = doubled(label)
    embeddings = embedded_twice(call)
    generators = [tiny.seeded(0), tiny.seeded(1)]
    together = drawn(pipe, call | embeddings | {"conditioning_frames": films}, K, generator=generators)
    assert len(together) == 2 * K
    for j in (0, 1):
        ones = []
        for shown in (films, [films[0], films[0]]):
            pipe, call = doubled(label)
            given = call | of_one(embeddings, j) | {"conditioning_frames": shown}
            ones.append(drawn(pipe, given, K, generator=tiny.seeded(j)))
        assert (ones[0] - ones[1]).abs().max() > 1e-3
        pipe, call = doubled(label)
        given = call | of_one(embeddings, j) | {"conditioning_frames": films}
        listed = drawn(pipe, given, K, generator=[tiny.seeded(j)])
        assert_equal(together[j * K : (j + 1) * K], listed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("label", VIDEOS)
def test_several_networks_of_videos_see_some_particles_at_a_time(label):
    films = [animatediff.conditions()["conditioning_frames"], [frame[0] for frame in animatediff.frames(20)]]
    case = replace(
        cases()[label],
        build=lambda: doubled(label)[0],
        call=lambda: doubled(label)[1] | {"conditioning_frames": films},
    )
    compare_runs(case, 5, (3, None), (2, None))


# ---- references ------------------------------------------------------------------------------------------------------


def glm(*lists):
    """The references of prompts (GLM-Image), with the tokens and the grid of each."""
    tokens = [torch.cat([torch.arange(32) % 16 for _ in one]) for one in lists]
    grids = [torch.tensor([[1, 4, 8]] * len(one)) for one in lists]
    return {"image": list(lists), "prior_token_image_ids": tokens, "source_image_grid_thw": grids}


@pytest.mark.slow
@pytest.mark.parametrize("generators", [[tiny.seeded(0), tiny.seeded(1)], None], ids=["listed", "none"])
def test_each_prompt_of_glm_image_has_references_of_its_own(generators):
    case = cases()["GlmImagePipeline"]
    a, b, c, d = (picture.resize((32, 16)) for picture in pictures("", 1, 2, 3, 4))
    embeddings = embedded_twice(case.call()) | {"prior_token_ids": case.call()["prior_token_ids"].repeat(2, 1)}

    def particles(given, chosen):
        seeds = None if generators is None else [tiny.seeded(j) for j in chosen]
        latents = None if seeds else noise(6, 4, 8, 16)[3 * chosen[0] : 3 * chosen[-1] + 3]
        rows = {name: value[list(chosen)] for name, value in embeddings.items()}
        return drawn(case.build(), case.call() | rows | given, K, generator=seeds, latents=latents)

    both = particles(glm([a, b], [c, d]), (0, 1))
    assert len(both) == 2 * K
    for j, own in enumerate(([a, b], [c, d])):
        alone = particles(glm(own), (j,))
        assert_equal(both[j * K : (j + 1) * K], alone)
        assert (alone - particles(glm([c, b]), (j,))).abs().max() > 1e-3
    shared = glm([a, b]) | {"image": [a, b]}
    assert_equal(particles(shared, (0, 1))[:K], particles(glm([a, b]), (0,)))


# ---- image prompts ---------------------------------------------------------------------------------------------------


def with_image_prompts(make):
    """A toy with two IP-Adapters of random weights and an encoder of images."""
    toy = tiny.Toy(make)
    network, generator = toy.network, tiny.seeded(5)
    sides = {"to_k_ip.weight": (32, 16), "to_v_ip.weight": (32, 16), "to_k_ip.bias": (32,), "to_v_ip.bias": (32,)}
    states = []
    for _ in range(2):
        weights = {f"0.{name}": torch.randn(shape, generator=generator) for name, shape in sides.items()}
        if make is tiny.sd:
            attention = [name for name in network.attn_processors if "attn2" in name]
            shapes = [network.get_submodule(name.removesuffix(".processor")).to_k.weight.shape for name in attention]
            weights = {
                f"{2 * i + 1}.to_{side}_ip.weight": torch.randn(shape, generator=generator)
                for i, shape in enumerate(shapes)
                for side in "kv"
            }
        projection = {"proj.weight": torch.randn(64, 16, generator=generator), "proj.bias": torch.zeros(64)}
        projection |= {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}
        states.append({"image_proj": projection, "ip_adapter": weights})
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(6)
    toy.pipe.register_modules(image_encoder=CLIPVisionModelWithProjection(config).eval())
    toy.pipe.register_modules(feature_extractor=CLIPImageProcessor(size=8, crop_size=8))
    network._load_ip_adapter_weights(states)
    return toy


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny.sd, tiny.flux])
@pytest.mark.parametrize("embedded", [False, True])
def test_image_prompts_are_for_all_prompts(make, embedded):
    """A list has one for each adapter, as images or embedded; they matter, also by a part of the rows."""

    def particles(prompt, seeds, shown, **options):
        toy = with_image_prompts(make)
        given = {"ip_adapter_image": shown}
        if embedded:
            prepare = toy.pipe.prepare_ip_adapter_image_embeds
            guided = [True] if make is tiny.sd else []
            with torch.no_grad():
                given = {"ip_adapter_image_embeds": prepare(shown, None, "cpu", 1, *guided)}
        guidance = {"guidance_scale": 3.0} if make is tiny.sd else {"true_cfg_scale": 3.0, "negative_prompt": "dull"}
        generators = [tiny.seeded(seed) for seed in seeds]
        out = toy.steer(prompt, generator=generators, num_particles=K, ess_threshold=0, **given, **guidance, **options)
        return torch.from_numpy(out.images[out.order.argsort(1).add(torch.arange(len(seeds))[:, None] * K).flatten()])

    shown = pictures("", 1, 2)
    both = particles(["a cat", "a dog"], (0, 1), shown)
    assert len(both) == 2 * K
    for j, prompt in enumerate(["a cat", "a dog"]):
        alone = particles(prompt, (j,), shown)
        torch.testing.assert_close(both[j * K : (j + 1) * K], alone, rtol=0, atol=1e-4)
        assert (alone - particles(prompt, (j,), shown[::-1])).abs().max() > 1e-3
    torch.testing.assert_close(
        particles(["a cat", "a dog"], (0, 1), shown, particle_batch_size=4), both, rtol=0, atol=1e-4
    )


# ---- latents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.sd, tiny.flux])
def test_latents_of_several_prompts_have_a_row_for_each_particle(make):
    """Prompt-major: the particles of a prompt are those of it alone with its rows, another row is another particle."""
    latents, prompts = tiny.Toy(make).latents(2 * K), ["a cat", "a dog"]

    def particles(prompt, rows):
        toy = tiny.Toy(make)
        return drawn(toy.pipe, toy.arguments(prompt, generator=None, latents=rows), K)

    both = particles(prompts, latents)
    assert len(both) == 2 * K
    for j, prompt in enumerate(prompts):
        assert_equal(both[j * K : (j + 1) * K], particles(prompt, latents[j * K : (j + 1) * K]))
    changed = particles(prompts, torch.cat([latents[:4], latents[4:5] + 1, latents[5:]]))
    moved = (changed - both).flatten(1).abs().amax(1)
    assert (moved > 0.1).tolist() == [False] * 4 + [True, False]


@pytest.mark.parametrize("make", [tiny.sd, tiny.flux])
def test_latents_of_each_prompt_are_refused(make):
    """Its particles would start alike; the pipeline would deal the rows out, or broadcast them."""
    toy, network_calls = tiny.Toy(make), []
    toy.network.register_forward_pre_hook(lambda *_: network_calls.append(1))
    said = "latents: expected prompts × num_particles = 6 rows, one for each particle, got 2: draw them for every"
    with pytest.raises(ValueError, match=said):
        toy.steer(["a cat", "a dog"], latents=toy.latents(2), num_particles=3)
    assert not network_calls
