"""The scripts of examples/ about rewards, offline."""

import base64
import io
import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import requests
import torch
from PIL import Image

import checkpoints
import custom_reward
import tiny
from glassflows.commands import verify_rewards
from glassflows.commands.main import main
from glassflows.rewards import HPSv2
from glassflows.rewards.open_clip import clip_from_open_clip

pytestmark = pytest.mark.filterwarnings("ignore:.*slow image processor:UserWarning")


class Service(BaseHTTPRequestHandler):
    """Scores pictures by their mean; answers 503 as often as it is told to."""

    failures = 0
    asked = 0
    delay = 0.0

    def do_POST(self):
        type(self).asked += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        failed = Service.asked <= Service.failures
        time.sleep(Service.delay)
        pictures = [Image.open(io.BytesIO(base64.b64decode(one))) for one in body["images"]]
        assert len(body["prompts"]) == len(pictures)
        answer = json.dumps({"scores": [float(np.asarray(picture).mean()) for picture in pictures]}).encode()
        with suppress(BrokenPipeError):  # where nobody waits any more
            self.send_response(503 if failed else 200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    def log_message(self, *args):
        pass


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Service.asked = 0
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_a_service_steers(url):
    """Although it fails at first."""
    Service.failures = 2
    reward = custom_reward.HTTPReward(url, timeout=5)
    images = torch.rand(3, 3, 4, 6, generator=tiny.seeded())
    expected = 255 * images.mean((1, 2, 3))
    np.testing.assert_allclose(reward(images, ["a"] * 3), expected, atol=0.5)
    assert Service.asked == 3
    out = tiny.Toy(tiny.flux).steer(reward=reward, num_transitions=2, num_inference_steps=4)
    np.testing.assert_allclose(out.image_rewards, 255 * out.images.mean((1, 2, 3)), atol=0.5)
    reward.session.close()


def test_a_service_that_is_down(url):
    Service.failures = 100
    toy, reward = tiny.Toy(tiny.flux), custom_reward.HTTPReward(url, timeout=5, retries=1)
    scheduler = toy.pipe.scheduler
    with pytest.raises(requests.RequestException, match="too many 503 error responses"):
        toy.steer(reward=reward, num_particles=2, num_transitions=2, num_inference_steps=2)
    assert toy.pipe.scheduler is scheduler
    reward.session.close()


def test_a_service_that_hangs(url, monkeypatch):
    monkeypatch.setattr(Service, "delay", 1.0)
    Service.failures = 0
    reward = custom_reward.HTTPReward(url, timeout=0.1, retries=0)
    with pytest.raises(requests.RequestException, match=r"Read timed out\. \(read timeout=0\.1\)"):
        reward(torch.rand(1, 3, 4, 6), ["a"])
    reward.session.close()


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
