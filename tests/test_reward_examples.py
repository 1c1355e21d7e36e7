"""The scripts of examples/ about rewards, offline."""

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import custom_reward
from glassflows.commands import verify_rewards
from glassflows.commands.main import main
from glassflows.rewards import HPSv2
from glassflows.rewards.open_clip import clip_from_open_clip

pytestmark = pytest.mark.filterwarnings("ignore:.*slow image processor:UserWarning")


def test_redness():
    images = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.5, 0.5, 0.5]])[:, :, None, None].expand(-1, -1, 4, 6)
    torch.testing.assert_close(custom_reward.redness(images, []), torch.tensor([1.0, -1.0, 0.0]))


def test_verification(tmp_path, monkeypatch):
    """On checkpoints of toy size: right where they are, and wrong where the published value is another."""
    picture = Image.fromarray(np.random.default_rng(0).integers(50, 200, (16, 16, 3), dtype=np.uint8))
    monkeypatch.setattr(verify_rewards, "picture", lambda url: picture)
    clip, hps, converted = (tmp_path / name for name in ("clip", "hpsv2", "converted"))
    got, expected, tolerance = verify_rewards.pick_score(str(checkpoints.clip(clip)), str(clip))
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    file = checkpoints.hpsv2(hps) / HPSv2.checkpoint
    checkpoints.clip_processor(converted)
    state = torch.load(file, weights_only=True)["state_dict"]
    clip_from_open_clip(state).save_pretrained(converted)
    monkeypatch.setattr(HPSv2, "default_processor", str(converted))
    got, expected, tolerance = verify_rewards.hpsv2(str(file), str(converted))
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    for value, right in (([24.57], True), ([20.0], False)):
        check = (torch.tensor([24.6]), torch.tensor(value), 0.05)
        monkeypatch.setitem(verify_rewards.CHECKS, "CLIPScore", lambda check=check: check)
        if right:
            main(["verify-rewards", "CLIPScore"])
        else:
            with pytest.raises(SystemExit, match="CLIPScore: not what is published"):
                main(["verify-rewards", "CLIPScore"])
