"""The larger rewards at toy size steer: images of the scenes, videos and sound of toys."""

import pytest
import torch

pytest.importorskip("diffusers", minversion="0.42")  # older ones build other pipelines

import clap_checkpoints
import ocr_checkpoints
import qwen_checkpoints
import tiny
from glassflows import FeynmanKacSteerer
from glassflows.rewards import AestheticScore, CLAPScore, Frames, HPSv3, OCRScore
from scenes import CALL, load_pipeline
from toy_rewards import WARNINGS
from zoo.survey import arguments, cases

pytestmark = [*WARNINGS, tiny.TRANSFORMERS_5, pytest.mark.filterwarnings("ignore:.*reads the first:UserWarning")]


def toy_of(label):
    case = cases()[label]
    return tiny.Toy(case.build, {name: one for name, one in arguments(case).items() if name != "generator"})


@pytest.mark.parametrize("twist", [0.0, 0.5])
def test_hpsv3_steers_the_scenes(twist, tmp_path):
    reward = HPSv3(qwen_checkpoints.hpsv3(tmp_path))
    steerer = FeynmanKacSteerer(load_pipeline(), reward, 2, num_transitions=2, twist=twist, reward_scale=1e4)
    out = steerer("a red circle", num_inference_steps=4, generator=tiny.seeded(), output_type="pt", **CALL)
    scores = reward(out.images, ["a red circle"] * 2)
    torch.testing.assert_close(scores.double(), out.image_rewards, rtol=0, atol=1e-5)
    assert (out.ledger.gradients > 0) == (twist > 0)


def test_ocr_steers_the_scenes(tmp_path):
    reward = OCRScore(ocr_checkpoints.trocr(tmp_path), text=lambda prompt: "TTAT", max_tokens=4)
    steerer = FeynmanKacSteerer(load_pipeline(), reward, 2, num_transitions=2, reward_scale=1.0, potential="max")
    out = steerer("a red circle", num_inference_steps=4, generator=tiny.seeded(), output_type="pt", **CALL)
    torch.testing.assert_close(reward(out.images, ["a red circle"] * 2).double(), out.image_rewards)
    assert (out.rewards > 0).all()


def test_clap_steers_sound(tmp_path):
    toy = toy_of("AudioLDM2Pipeline")
    reward = CLAPScore(clap_checkpoints.clap(tmp_path), sampling_rate=toy.pipe.vocoder.config.sampling_rate)

    def raining(sound, prompts):  # the toy is given embeddings
        return reward(sound, ["rain"] * len(sound))

    out = toy.steer(reward=raining, num_particles=2, num_inference_steps=4, reward_scale=1e4)
    sound = torch.from_numpy(out.images)[:, None]
    torch.testing.assert_close(raining(sound, None).double(), out.image_rewards, rtol=0, atol=1e-4)


@pytest.mark.parametrize("reduce", ["mean", "min"])
def test_frames_steer_videos(folders, reduce):
    toy = toy_of("WanPipeline, two experts")
    reward = Frames(AestheticScore(folders["AestheticScore"]), frames=2, reduce=reduce)
    out = toy.steer(reward=reward, num_particles=2, num_inference_steps=4, reward_scale=1e3)
    videos = torch.from_numpy(out.images).movedim(-1, 2)
    expected = reward(videos)
    torch.testing.assert_close(expected.double(), out.image_rewards, rtol=0, atol=1e-3)
