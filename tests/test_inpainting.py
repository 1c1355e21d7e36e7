"""Inpainting: crops to the mask are pasted back, and an interrupted call keeps what the pipeline would keep."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", minversion="0.42")  # older ones build other pipelines

import tiny
from glassflows import BestOfN, FeynmanKac, FeynmanKacSteerer, GLASSScheduler, Steerer, Twist
from glassflows.host.decode import PipelineCall, decoder
from zoo import text
from zoo.survey import arguments, cases, documented, sampled

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:In CPU autocast:UserWarning")

MAKES = [tiny.sd_inpaint, tiny.flux_inpaint]


def photograph(width=40, height=28):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def hole(width=40, height=28):
    """A mask of a part of the photograph, and where it keeps pixels."""
    mask = np.zeros((height, width), np.uint8)
    mask[10:16, 20:28] = 255
    return Image.fromarray(mask), mask == 0


CROP = {"image": photograph(), "mask_image": hole()[0], "padding_mask_crop": 2, "strength": 1.0}

# ---- crops to the mask -----------------------------------------------------------------------------------------------


def cropped(make, **more):
    toy = tiny.Toy(make)
    return toy, toy.arguments(generator=[tiny.seeded(1), tiny.seeded(2)], **CROP, **more)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_crops_are_pasted_as_by_the_pipeline_itself(make, output_type):
    """Steered they are those of a plain call with the same scheduler; what is kept is the photograph, bit by bit."""
    toy, given = cropped(make)
    expected = toy.glass(3).pipe(**given | {"num_images_per_prompt": 2, "output_type": "pil"}).images
    toy, given = cropped(make)
    out = toy.steerer(reward=lambda images, _: [1.0, 0.0], num_particles=2, ess_threshold=0)(
        **given | {"output_type": output_type}
    )
    images = out.images if output_type == "pil" else [(255 * one).round().astype(np.uint8) for one in out.images]
    kept = hole()[1]
    for one, same in zip(images, expected, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(same))
        assert np.array_equal(np.asarray(one)[kept], np.asarray(photograph())[kept])
        assert np.abs(np.asarray(one)[~kept].astype(int) - np.asarray(photograph())[~kept]).max() > 8


@pytest.mark.parametrize("make", MAKES)
def test_the_reward_sees_the_whole_picture(make):
    """On the way and at the end, pasted; the last prediction is what is returned."""
    toy, given = cropped(make)
    seen = []

    def reward(images, prompts):
        seen.append(images.clone())
        return images.mean((1, 2, 3))

    out = toy.steerer(reward=reward, num_particles=2, previews=True, reward_scale=0)(**given)
    original = torch.tensor(np.asarray(photograph())).movedim(-1, 0) / 255
    kept = torch.from_numpy(hole()[1])
    assert len(seen) == 3
    for images in seen:
        assert images.shape == (2, 3, 28, 40)
        assert torch.equal(images[..., kept], original[:, kept].expand(2, -1, -1))
    assert (seen[0] - seen[-1]).abs().max() > 0.02
    assert torch.equal(torch.from_numpy(out.images).movedim(-1, 1), seen[-1][out.order[0]])


@pytest.mark.parametrize("make", MAKES)
def test_several_prompts_share_the_photograph(make):
    """As in a plain call with a prompt and a generator for each particle."""
    given = CROP | {"output_type": "pil"}
    toy = tiny.Toy(make).glass(3)
    prompts = ["a cat", "a cat", "a dog", "a dog"]
    expected = toy.run(prompts, generator=[tiny.seeded(seed) for seed in range(4)], **given)
    toy, options = tiny.Toy(make), {"reward": lambda images, _: [2.0, 1.0] * 2, "num_particles": 2, "ess_threshold": 0}
    out = toy.steer(prompts[::2], generator=[tiny.seeded(seed) for seed in range(4)], **given, **options)
    for one, same in zip(out.images, expected, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(same))


def test_twists_need_pictures_with_gradients():
    toy, given = cropped(tiny.sd_inpaint)
    twist = Twist(0.5)
    steerer = Steerer(toy.pipe, lambda images, _: images.mean((1, 2, 3)), FeynmanKac(), 2, twist=twist)
    with pytest.raises(ValueError, match="twist: expected images with a gradient in the latents, got those of padding"):
        steerer(**given)


def croppable():
    """The steered classes that crop to a mask."""
    rows = documented()
    return sorted(
        label
        for label, case in cases().items()
        if {"padding_mask_crop", "mask_image"} <= text.parameters(case)
        and "mask_image" in case.call()
        and rows[label].steered == "yes"
    )


def whole_pictures(call):
    """A call with a larger image and mask, as PIL's, that are cropped."""
    image, mask = photograph(96, 80), hole(96, 80)[0]
    return call | {"image": image, "mask_image": mask, "padding_mask_crop": 4}


BROKEN = {  # natively, by what they say
    "QwenImageEditInpaintPipeline": "images do not match",
    "StableDiffusionPAGInpaintPipeline": "The output type should be PIL when inpainting mask crop, but is None",
    "StableDiffusionXLControlNetUnionInpaintPipeline": "should be a PIL image when inpainting mask crop, but is",
}
LEAVE_CROPPED = ("ChromaInpaintPipeline", "FluxControlNetInpaintPipeline", "FluxKontextInpaintPipeline")


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize("label", croppable())
def test_every_class_that_crops(label):
    """The picture is that of a plain call with the same scheduler; the reward sees one of its kind on the way."""
    case, seen = cases()[label], []

    def reward(images, prompts):
        seen.append(images.clone())
        return [0.0]

    pipe, call = text.worded(case)
    native = pipe.scheduler
    pipe.scheduler = GLASSScheduler.from_scheduler(native, num_transitions=2)
    torch.manual_seed(0)
    given = arguments(case, whole_pictures(call)) | {"output_type": "pil"}
    if label in BROKEN:
        with pytest.raises(ValueError, match=BROKEN[label]):
            pipe(**given)
        return
    expected = np.asarray(pipe(**given).images[0])
    pipe.scheduler = native
    torch.manual_seed(0)
    given = arguments(case, whole_pictures(call)) | {"output_type": "pil"}
    out = FeynmanKacSteerer(pipe, reward, 1, num_transitions=2, reward_scale=0)(**given)
    assert np.abs(np.asarray(out.images[0]).astype(int) - expected).max() <= 1
    before, last = seen
    assert before.shape == last.shape == (1, 3, *expected.shape[:2])
    if label not in LEAVE_CROPPED:
        assert expected.shape == (80, 96, 3)
        kept = torch.from_numpy(hole(96, 80)[1])
        assert torch.equal(before[..., kept], last[..., kept])


# ---- interrupted -----------------------------------------------------------------------------------------------------


def latents_of(case, steps, after=None):
    """The latents that two particles end with, and their predictions; interrupted after some steps."""
    pipe, predicted = case.build(), []
    native = pipe.scheduler

    def stopping(call, z):
        predicted.append(z.clone())
        if len(predicted) == after:
            pipe._interrupt = True

    pipe.scheduler = GLASSScheduler.from_scheduler(native, num_transitions=2)
    pipe.scheduler.on_denoised = stopping
    unpacked = []
    if hasattr(pipe, "_unpack_latents_with_ids"):  # FLUX.2's latents leave the pipeline as something else
        unpack = pipe._unpack_latents_with_ids
        pipe._unpack_latents_with_ids = lambda z, ids: unpacked.append(z) or unpack(z, ids)
    given = arguments(case) | {"num_inference_steps": steps, "output_type": "latent"}
    torch.manual_seed(0)
    out = Steerer(pipe, lambda z, _: [0.0] * len(z), BestOfN(), 2, decode="latents")(**given)
    assert out.interrupted == (after is not None)
    return unpacked[0] if unpacked and after is None else by_slot(out), predicted[-1]


def keeping():
    """The classes that may be interrupted and blend what they keep, or do not."""
    rows = documented()
    return sorted(
        label
        for label, case in cases().items()
        if not {"mask_image", "control_mask", "mask_video"}.isdisjoint(text.parameters(case))
        and hasattr(getattr(diffusers, case.name), "interrupt")
        and rows[label].steered == "yes"
    )


BLENDS_NOTHING = {  # their networks see the mask
    "EasyAnimateInpaintPipeline", "FluxFillPipeline", "QwenImageControlNetInpaintPipeline",
    "StableDiffusion3ControlNetInpaintingPipeline", "StableDiffusionInpaintPipeline",
    "StableDiffusionPAGInpaintPipeline", "StableDiffusionXLPAGInpaintPipeline", "ZImageControlNetInpaintPipeline",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("label", sampled(keeping()))
@pytest.mark.parametrize("after", [1, 2])
def test_what_is_kept_is_put_back_into_interrupted_latents(label, after):
    """Where two whole runs agree, though of other steps, they hold the image; so do the latents. Elsewhere, the ẑ."""
    case = cases()[label]
    (one, _), (other, _) = (latents_of(case, steps) for steps in (5, 7))
    interrupted, predicted = latents_of(case, 5, after)
    kept = (one - other).abs() < 1e-6
    if label in BLENDS_NOTHING:
        assert kept.float().mean() < 0.01
        assert torch.equal(interrupted, predicted)
        return
    assert 0.2 < kept.float().mean() < 0.8
    torch.testing.assert_close(interrupted[kept], one[kept], rtol=0, atol=1e-6)
    assert (predicted - one)[kept].abs().max() > 0.05
    painted = ~kept
    same = (interrupted - predicted)[painted].abs() < 1e-6
    assert same.float().mean() > 0.7  # FLUX.2's mask has soft edges


def painted(z):
    """Where latents of 16 × 24 pixels are painted, which is the left half: FLUX's are 4 × 6 tokens."""
    tokens = z.ndim == 3
    return (torch.arange(6) < 3).repeat(4)[:, None] if tokens else torch.arange(12) < 6


def by_slot(out):
    """The images of a result, or latents, in the order of the particles."""
    rows = out.order + out.rewards.shape[1] * torch.arange(len(out.order))[:, None]
    return out.images[rows.flatten().argsort()]


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("prompt", ["a cat", ["a cat", "a dog"]])
def test_interrupted_images_show_what_is_kept(make, prompt):
    """Their latents are the image's where it is kept, which a whole run ends with, and the last ẑ elsewhere."""
    toy, predicted = tiny.Toy(make).glass(3), []
    options = {"num_transitions": None, "seed": 4}
    image = by_slot(toy.steer(prompt, ess_threshold=0, output_type="latent", **options))

    def stopping(call, z):
        predicted.append(z.clone())
        toy.pipe._interrupt = call.index + 1 == 5  # the first call of the last transition

    toy.pipe.scheduler.on_denoised = stopping
    out = toy.steer(prompt, ess_threshold=1, reward_scale=0.5, **options)
    assert out.interrupted
    assert out.resampled[-1].all()
    moved = torch.cat([ancestors + 4 * j for j, ancestors in enumerate(out.ancestors[-1])])
    latents = torch.where(painted(image), predicted[-1][moved], image)
    with torch.no_grad():
        decode = decoder(PipelineCall(toy.pipe, toy.call))
        expected, without = (decode(z).movedim(1, -1).numpy() for z in (latents, predicted[-1][moved]))
    np.testing.assert_allclose(by_slot(out), expected, atol=1e-5)
    assert np.abs(without - expected).max() > 0.02
