"""What a pipeline puts out: in every form that is asked for, and with what comes beside the samples."""

import numpy as np
import torch
from PIL.Image import Image

import tiny
from zoo import ltx2


def test_output_types(toy):
    arrays = toy.steer().images
    assert arrays.shape == (4, 16, 24, 3)
    pictures = toy.steer(output_type="pil").images
    assert all(isinstance(picture, Image) for picture in pictures)
    np.testing.assert_allclose(np.stack([np.asarray(p) for p in pictures]) / 255, arrays, atol=0.51 / 255)
    tensors = toy.steer(output_type="pt").images
    np.testing.assert_array_equal(tensors.permute(0, 2, 3, 1).numpy(), arrays)
    latents = toy.steer(output_type="latent")
    assert len(latents.images) == 4
    np.testing.assert_allclose(latents.rewards, toy.steer().rewards, atol=1e-3)


@tiny.DIFFUSERS_42
def test_sound_comes_with_its_video():
    """LTX-2's, of the same particle as the frames."""
    toy = tiny.Toy(lambda: ltx2.build("LTX2Pipeline"), ltx2.call() | {"num_inference_steps": 4, "output_type": "np"})
    ranked = {"reward": lambda videos, prompts: [0.0, 1.0, 2.0], "num_particles": 3, "ess_threshold": 0}
    out = toy.steer(num_transitions=2, **ranked)
    embeds = {name: torch.cat([value] * 3) for name, value in toy.call.items() if "embeds" in name or "mask" in name}
    plain = toy.glass(2).pipe(**toy.arguments(**embeds))
    np.testing.assert_allclose(out.frames, plain.frames[[2, 1, 0]], atol=1e-4)
    np.testing.assert_allclose(np.asarray(out.audios), np.asarray(plain.audio)[[2, 1, 0]], atol=1e-4)
