"""Rows of a call: a batch of prompts is laid out prompt-major, and its particles are those of each prompt alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", minversion="0.42")  # older ones build other pipelines

import tiny
from glassflows import BestOfN, GLASSScheduler, Steerer
from glassflows.host.batch import lay_out
from glassflows.host.refusals import UnsteerablePipeline
from zoo import hunyuan_video, text, unconditional
from zoo.survey import cases, documented, run, sampled
from zoo.text import WORDS

WARNINGS = [  # of diffusers' and torch's own making
    "ignore::FutureWarning",
    "ignore:In CPU autocast:UserWarning",
    "ignore:flex_attention called without:UserWarning",
]
pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]

STEPS, PARTICLES = 2, 4
SHORT, LONG = "a cat", "big red dogs bark"
GLOBAL = "its control image is encoded with the global generator"
TOGETHER = "its tokens see how long the longest prompt is"
REASONS = {  # why particles cannot equal those of their prompt alone
    "AudioLDM2Pipeline": "its language model goes on after the padding of the longest prompt",
    "CogView4ControlPipeline": GLOBAL,
    "CogView4Pipeline": TOGETHER,
    "HunyuanDiTControlNetPipeline": GLOBAL,
    "NucleusMoEImagePipeline": "its experts choose among the tokens of all that is padded",
    "QwenImage21Pipeline": TOGETHER,
    "QwenImageControlNetInpaintPipeline": GLOBAL,
    "StableDiffusion3ControlNetInpaintingPipeline": GLOBAL,
    "StableDiffusion3ControlNetPipeline": GLOBAL,
    "EasyAnimateInpaintPipeline": "it draws noise with one generator only",
}

ONE_PROMPT = (  # they take one prompt at a time
    "LongCatImageEditPipeline", "OmniGenPipeline", "OmniGenPipeline, from an image", "QwenImageEditPlusPipeline",
)  # fmt: skip
ONE_IMAGE = (  # they take one for all prompts
    "ChronoEditPipeline", "HunyuanVideo15ImageToVideoPipeline", "SanaImageToVideoPipeline",
    "SkyReelsV2ImageToVideoPipeline", "WanImageToVideoPipeline", "WanImageToVideoPipeline, a time per token",
    "WanImageToVideoPipeline, two experts",
)  # fmt: skip


def labels(chosen):
    """The cases that can be steered, if only with `decode=`, by the document, and are chosen."""
    rows = documented()
    run = [label for label, row in rows.items() if row.swap.startswith("yes") and "cannot be" not in row.steered]
    return sorted(label for label in run if chosen(cases()[label]))


def seeds(label, *numbers):
    """A generator for each prompt, where the class can do with several."""
    generators = [tiny.seeded(number) for number in numbers]
    return generators[0] if label == "EasyAnimateInpaintPipeline" else generators


def drawn(pipe, call, number=PARTICLES, **more):
    """The latents of a call's particles, prompt-major; none is moved."""
    seen = []

    def reward(latents, prompts):
        seen.append(latents.clone())
        return torch.arange(len(prompts), dtype=torch.float64)

    given = {"num_inference_steps": STEPS, **call, **more}
    given = {name: value for name, value in given.items() if not isinstance(value, str) or value != "DROP"}
    given.setdefault("output_type", "np")
    torch.manual_seed(0)
    Steerer(pipe, reward, BestOfN(), number, num_transitions=2, decode="latents")(**given)
    return seen[-1]


def assert_equal(particles, alone):
    torch.testing.assert_close(particles, alone, rtol=0, atol=1e-4 * max(1.0, float(alone.abs().max())))


# ---- the layout ------------------------------------------------------------------------------------------------------


def test_batch_size_counts_prompts():
    """Of an unconditional pipeline: three groups of two particles, each with the noise of its own."""
    pipe = unconditional.ddim()
    batch = lay_out(pipe, {"batch_size": 3}, 2)
    assert batch.arguments == {"batch_size": 6}
    assert batch.prompts == [None] * 6
    result = Steerer(pipe, lambda images, prompts: images.mean((1, 2, 3)), BestOfN(), 2, decode=None)(
        batch_size=3, num_inference_steps=STEPS, generator=tiny.seeded(), output_type="np"
    )
    assert result.rewards.shape == (3, 2)


def test_an_image_without_a_batch_is_one_image():
    """Three prompts' embeddings and a tensor of three channels."""
    picture = torch.rand(3, 16, 24)
    given = {"prompt_embeds": torch.rand(3, 5, 16), "image": picture}
    laid = lay_out(tiny.sd_img2img(), given, 2).arguments["image"]
    assert laid.shape == (6, 3, 16, 24)
    assert all(torch.equal(one, picture) for one in laid)


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_prompts_may_be_in_any_sequence(kind):
    batch = lay_out(tiny.flux(), {"prompt": kind([SHORT, LONG]), "prompt_2": "x", "negative_prompt": ""}, 2)
    assert batch.arguments["prompt"] == batch.prompts == [SHORT, SHORT, LONG, LONG]
    assert batch.arguments["prompt_2"] == ["x"] * 4
    assert batch.arguments["negative_prompt"] == [""] * 4


def test_rows_are_told_by_names_not_by_lengths():
    """Of two prompts: two sigmas, two sizes and two scales belong to all."""
    apart = {"sigmas": [1.0, 0.5], "original_size": (16, 24), "guidance_scale": torch.ones(2)}
    apart |= {"ip_adapter_image": [1, 2]}  # of two adapters
    masks = {"prompt_embeds": torch.rand(2, 5, 16), "prompt_embeds_mask": torch.tensor([[1, 1], [1, 0]])}
    laid = lay_out(tiny.flux(), apart | masks, 3).arguments
    assert all(laid[name] is value for name, value in apart.items())
    assert laid["prompt_embeds_mask"].tolist() == [[1, 1]] * 3 + [[1, 0]] * 3


def test_layers_and_ends_have_rows_of_their_own():
    """HiDream's rows are the second axis; of Kandinsky 5 the ends of prompts of 3 and 2 tokens."""
    llama = torch.rand(4, 2, 5, 8)
    given = {"prompt_embeds_llama3": llama, "prompt_cu_seqlens": torch.tensor([0, 3, 5], dtype=torch.int32)}
    laid = lay_out(tiny.flux(), {"prompt": [SHORT, LONG], **given}, 2).arguments
    assert torch.equal(laid["prompt_embeds_llama3"], llama[:, [0, 0, 1, 1]])
    assert laid["prompt_cu_seqlens"].tolist() == [0, 3, 6, 8, 10]
    assert laid["prompt_cu_seqlens"].dtype == torch.int32


def test_keyframes_are_of_all_prompts():
    """Of LTX: a list of images is one for each keyframe, in a condition or by itself."""
    pipe = cases()["LTXConditionPipeline"].build()
    first, last = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    given = {"prompt": [SHORT, LONG], "image": [first, last], "frame_index": [0, 8]}
    laid = lay_out(pipe, given, 2).arguments
    assert laid["image"] == [[first] * 4, [last] * 4]
    assert laid["frame_index"] == [0, 8]
    condition = cases()["LTXConditionPipeline"].call()["conditions"][1]
    (laid,) = lay_out(pipe, {"prompt": SHORT, "conditions": condition}, 3).arguments["conditions"]
    assert laid.image.shape == (3, *condition.image.shape[1:])
    assert laid.frame_index == condition.frame_index


def test_other_numbers_of_rows_are_refused():
    pipe = tiny.sd_img2img()
    for name, value in {"image": torch.rand(4, 3, 16, 24), "negative_prompt": ["a"] * 3}.items():
        with pytest.raises(ValueError, match=f"{name}: expected one, or one for each prompt, 2, got {len(value)}"):
            lay_out(pipe, {"prompt": [SHORT, LONG], name: value}, 2)


@pytest.mark.parametrize(
    ("label", "more", "says"),
    [
        *((label, {"image": 2}, "it takes one image for all prompts, got 2") for label in ONE_IMAGE),
        *((label, {}, "it takes one prompt at a time, got 2") for label in ONE_PROMPT),
        ("Cosmos2_5_PredictBasePipeline, from a video", {}, "it draws one sample at a time"),
        ("WanVACEPipeline", {}, "it draws one video at a time"),
    ],
)
def test_what_a_class_cannot_do_is_refused_before_the_run(label, more, says):
    pipe, call = text.worded(cases()[label])
    call |= {name: [call[name]] * number for name, number in more.items()} | {"prompt": [SHORT, LONG]}
    with pytest.raises(UnsteerablePipeline, match=says):
        Steerer(pipe, lambda images, prompts: torch.zeros(len(prompts)), BestOfN(), 2)(**call)


# ---- every class -----------------------------------------------------------------------------------------------------

VERY_WORDY = {"BriaFiboEditPipeline": '{{"edit_instruction": "{}"}}'}


def prompts_for(label):
    return [VERY_WORDY.get(label, "{}").format(words) for words in (SHORT, LONG)]


def worded(label):
    return text.worded(cases()[label])


def prompted(case):
    return not {"prompt", "args"}.isdisjoint(text.parameters(case))  # of placeholders nothing is known


@pytest.mark.slow
@pytest.mark.parametrize("label", sampled(labels(lambda case: prompted(case) and case.label not in ONE_PROMPT)))
def test_two_prompts_in_words(label):
    """Prompts of different lengths, one image and one negative prompt for both."""
    both, *alone = (
        drawn(*worded(label), prompt=prompt, generator=generators)
        for prompt, generators in [
            (prompts_for(label), seeds(label, 0, 1)),
            (prompts_for(label)[0], seeds(label, 0)),
            (prompts_for(label)[1], seeds(label, 1)),
        ]
    )
    assert len(both) == 2 * PARTICLES
    if label in REASONS:
        return
    for j, one in enumerate(alone):
        assert_equal(both[j * PARTICLES : (j + 1) * PARTICLES], one)


@pytest.mark.slow
@pytest.mark.parametrize("label", sampled(labels(prompted)))
def test_one_prompt_in_words(label):
    """A string, PIL images and one generator; the particles differ."""
    particles = drawn(*worded(label), number=2, generator=tiny.seeded())
    assert len(particles) == 2
    one_call_from_one_latent = label == "StableDiffusionXLImg2ImgPipeline, refiner"
    assert one_call_from_one_latent != bool((particles[0] - particles[1]).abs().max() > 1e-3)


LAST_BUILT = {  # what toys of their own read words and pictures for, and by which arguments of the call
    "AudioLDM2Pipeline": (),
    "HunyuanVideoImageToVideoPipeline": ("image",),
    "HunyuanVideoImageToVideoPipeline, token_replace": ("image",),
    "JoyImageEditPipeline": ("image",),
    "JoyImageEditPlusPipeline": ("images",),
    "MotifVideoImage2VideoPipeline": ("image",),
    "OmniGenPipeline, from an image": ("input_images",),
    "QwenImageLayeredPipeline": ("image",),
}


@pytest.mark.slow
@pytest.mark.parametrize("label", LAST_BUILT)
def test_toy_encoders_tell_words_and_pictures_apart(label):
    """Else calls in words would compare nothing."""
    case, (pipe, call) = cases()[label], worded(label)
    pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler, num_transitions=2)

    def output(**changed):
        return run(replace(case, call=lambda: call | changed), pipe).output

    same, again = output(), output()
    assert np.array_equal(same, again)
    others = [{"prompt": call["prompt"].replace(WORDS, LONG) + "s"}]
    others += [{name: mirrored(call[name])} for name in LAST_BUILT[label]]
    for changed in others:
        assert np.abs(output(**changed) - same).max() > 1e-5


def test_without_words_the_prompt_is_a_caption():
    """Qwen-Image-Layered's own, of the picture it is given; with our scheduler too."""
    label = "QwenImageLayeredPipeline"
    case, (pipe, call) = cases()[label], worded(label)
    pipe.scheduler = GLASSScheduler.from_scheduler(pipe.scheduler, num_transitions=2)
    resized = pipe.image_processor.resize(call["image"], 320, 1280)
    caption = pipe.get_image_caption(resized, use_en_prompt=False, device="cpu")
    silent = run(replace(case, call=lambda: call | {"prompt": ""}), pipe)
    said = run(replace(case, call=lambda: call | {"prompt": caption}), pipe)
    assert np.array_equal(silent.output, said.output)


def test_the_template_of_hunyuan_video_is_cut_where_the_image_is():
    """By a tokenizer that counts as that of Llama 3 does; else the pipeline reads words for the image."""
    tokenizer = worded("HunyuanVideoImageToVideoPipeline")[0].tokenizer
    template = hunyuan_video.DEFAULT_PROMPT_TEMPLATE
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(template["template"].format(SHORT))["input_ids"])
    assert tokens[template["image_emb_start"]] == "<image>"
    first = tokens[template["crop_start"] :]
    assert "".join(first[: first.index("<|eot_id|>")]).replace("Ġ", " ") == SHORT


def rows_of(name, value, chosen):
    """Some rows of what is embedded, as a call's argument has them."""
    if "cu_seqlens" in name:
        return torch.cat([value[:1], value.diff()[chosen].cumsum(0).to(value)])
    if isinstance(value, list):
        return [value[i] for i in chosen]
    return value[:, chosen] if "llama3" in name else value[chosen]


def beside(name, value):
    """The embeddings of two prompts: those of one, and others whose mask is shorter."""
    if "cu_seqlens" in name:
        return torch.cat([value, value[-1:] + value[1:]])
    if isinstance(value, list):
        return [*value, value[0].flip(0) if isinstance(value[0], torch.Tensor) else value[0][::-1]]
    axis = 1 if "llama3" in name else 0
    if "mask" not in name:
        return torch.cat([value, value.flip(-1)], axis)
    shorter = value.clone()
    shorter[:, -2:] = 0
    return torch.cat([value, shorter])


@pytest.mark.slow
@pytest.mark.parametrize(
    "label", sampled(labels(lambda case: text.embedded(case.call()) and case.label not in ONE_PROMPT))
)
def test_two_prompts_as_embeddings(label):
    """Masks of different lengths; the same image for both."""
    case = cases()[label]
    given = {name: beside(name, value) for name, value in case.call().items() if text.embedded({name: value})}

    def particles(chosen):
        torch.manual_seed(0)
        embeddings = {name: rows_of(name, value, chosen) for name, value in given.items()}
        return drawn(case.build(), case.call() | embeddings, generator=seeds(label, *chosen))

    both = particles([0, 1])
    assert len(both) == 2 * PARTICLES
    for j in (0, 1):
        if label not in REASONS:
            assert_equal(both[j * PARTICLES : (j + 1) * PARTICLES], particles([j]))


def mirrored(picture):
    """Another picture of the same kind."""
    if isinstance(picture, list):
        return [mirrored(one) for one in picture]
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if isinstance(picture, Image.Image) else picture.flip(-1)


SEVERAL = ("image", "control_image", "hint", "video")
SHARED = ("BriaFibo", "Flux2Klein", "GlmImage", "QwenImage21", "ZImageOmni", "VisualCloze")


def pictured(case):
    references = case.name.startswith(SHARED) or "Union" in case.name or case.label in ONE_PROMPT + ONE_IMAGE
    return not references and not set(SEVERAL).isdisjoint(case.call()) and prompted(case)


@pytest.mark.slow
@pytest.mark.parametrize("label", sampled(labels(pictured)))
def test_an_image_for_each_prompt(label):
    """Prompts of one length, for what the longest one tells the others."""
    pipe, call = worded(label)
    name = next(name for name in SEVERAL if name in call)
    prompts = [prompts_for(label)[0], prompts_for(label)[0].replace("cat", "dog")]
    images = [call[name], mirrored(call[name])]
    several = torch.cat(images) if isinstance(images[0], torch.Tensor) else images
    both = drawn(pipe, call | {name: several, "prompt": prompts}, generator=seeds(label, 0, 1))
    assert len(both) == 2 * PARTICLES
    for j in (0, 1):
        pipe, call = worded(label)
        one = drawn(pipe, call | {name: images[j], "prompt": prompts[j]}, generator=seeds(label, j))
        if label not in REASONS:
            assert_equal(both[j * PARTICLES : (j + 1) * PARTICLES], one)
