"""Rewards elsewhere: a server in another process, and services that fail in every way."""

import base64
import copy
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from PIL import Image

import glassflows
import tiny
from glassflows.commands import serve
from glassflows.commands.main import main
from glassflows.commands.serve import app
from glassflows.rewards import ChatReward, Ranked, RemoteReward, RemoteRewardError
from toy_rewards import images

QUICK = {"backoff": 0.01, "timeout": 5.0}


def mean(given, prompts):
    return 100 * given.flatten(1).mean(1)


# ---- a service that does what it is told -----------------------------------------------------------------------------


class Scripted(BaseHTTPRequestHandler):
    """Answers each request as the next of its `script` says, and as a good service when that has ended."""

    def do_GET(self):
        self.answer(200, {"reward": "mean", "reward_scale": 25.0})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append((self.path, dict(self.headers), body))
            deed = server.script.pop(0) if server.script else server.good
        with suppress(BrokenPipeError, ConnectionResetError):
            deed(self, body)

    def answer(self, status, body, headers=(), cut=0):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) - cut])

    def log_message(self, *args):
        pass


def means(handler, body):
    pictures = [Image.open(io.BytesIO(base64.b64decode(one))) for one in body["images"]]
    assert len(body["prompts"]) == len(pictures)
    handler.answer(200, {"scores": [float(np.asarray(picture).mean()) / 2.55 for picture in pictures]})


def with_status(status, *headers):
    return lambda handler, body: handler.answer(status, {"error": f"because of {status}"}, headers)


def garbage(handler, body):
    handler.answer(200, b"<html>starting</html>")


def half(handler, body):
    handler.answer(200, {"scores": [1.0] * 50}, cut=100)


def dropped(handler, body):
    handler.connection.close()


def texts(handler, body):
    handler.answer(200, {"scores": "123"})


def no_gzip(handler, body):
    handler.answer(200, {"scores": [1.0]}, [("Content-Encoding", "gzip")])


def nan(handler, body):
    handler.answer(200, {"scores": [float("nan")] * len(body["images"])})


def slow(handler, body):
    time.sleep(0.6)
    means(handler, body)


@contextmanager
def serving(*script, good=means):
    """Run a service in a thread; yields it, with its address as `url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.script, server.good, server.asked = list(script), good, []
    server.lock = threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("deed", [with_status(500), with_status(503), garbage, half, dropped, nan, texts, no_gzip])
def test_a_service_that_fails_at_first(deed):
    with serving(deed, deed) as service:
        scores = RemoteReward(service.url, **QUICK)(images(), ["a"] * 3)
        torch.testing.assert_close(scores, mean(images(), None).double(), rtol=0, atol=1e-4)
        assert len(service.asked) == 3


def test_a_service_that_is_slow():
    with serving(slow) as service:
        RemoteReward(service.url, backoff=0.01, timeout=0.3)(images(), ["a"] * 3)
        assert len(service.asked) == 2
    with (
        serving(good=slow) as service,
        pytest.raises(RemoteRewardError, match=r"/score was asked once and did not answer well: no answer within 0\.1"),
    ):
        RemoteReward(service.url, timeout=0.1, retries=0)(images(), ["a"] * 3)


def test_a_service_may_say_when_to_come_again():
    """But no sooner than without being asked to."""
    for seconds, backoff in ((0.5, 0.0), (0, 0.7)):
        with serving(with_status(429, ("Retry-After", str(seconds)))) as service:
            start = time.monotonic()
            RemoteReward(service.url, backoff=backoff)(images(), ["a"] * 3)
            assert 0.5 <= time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("deed", "times", "message"),
    [
        (with_status(401), 1, "was asked once and did not answer well: status 401, .*because of 401"),
        (with_status(500), 3, "was asked 3 times and did not answer well: status 500"),
        (garbage, 3, "was asked 3 times and did not answer well: an answer that cannot be read .*<html>starting"),
        (half, 3, "asked 3 times and did not answer well: (the answer broke off|no connection, or it broke off)"),
        (lambda handler, body: handler.answer(200, {"scores": [1.0]}), 1, "answered 1 scores of 3 images"),
    ],
)
def test_a_service_that_never_answers_well(flux, deed, times, message):
    """The pipeline is as it was, and the message says what came last."""
    native = flux.pipe.scheduler
    with serving(good=deed) as service:
        reward = RemoteReward(service.url, retries=2, **QUICK)
        with pytest.raises((RemoteRewardError, ValueError), match=message):
            reward(images(), ["a"] * 3)
        assert len(service.asked) == times
        with pytest.raises((RemoteRewardError, ValueError)):
            flux.steer(reward=reward)
    assert flux.pipe.scheduler is native


def test_nobody_is_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RemoteRewardError, match=f"^RemoteReward: {url}/score was asked 3 times .*: no connection"):
        RemoteReward(url, retries=2, backoff=0.01)(images(), ["a"] * 3)


def test_batches_side_by_side():
    """No more at a time than are allowed, of all threads, and in their order."""
    now, most = [], []

    def pausing(handler, body):
        now.append(body)
        most.append(len(now))
        time.sleep(0.05)
        now.remove(body)  # before it is answered, after which the next one comes
        means(handler, body)

    given = images(12)
    with serving(good=pausing) as service:
        reward, found = RemoteReward(service.url, batch_size=2, concurrency=3), []
        threads = [threading.Thread(target=lambda: found.append(reward(given, ["a"] * 12))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [len(body["images"]) for _, _, body in service.asked] == [2] * 12
        assert max(most) == 3
    for scores in found:
        torch.testing.assert_close(scores, mean(given, None).double(), rtol=0, atol=1e-4)


def test_an_end_does_not_wait_for_answers():
    """Nor does that of the interpreter: what is under way are daemons."""

    def late(handler, body):
        time.sleep(0.2)
        with_status(400)(handler, body)

    with serving(late, good=slow) as service:
        start = time.monotonic()
        with pytest.raises(RemoteRewardError, match="status 400"):
            RemoteReward(service.url, batch_size=1, **QUICK)(images(), ["a"] * 3)
        assert time.monotonic() - start < 0.55
        under_way = [thread for thread in threading.enumerate() if thread.name == "glassflows request"]
        assert len(under_way) == 2
        assert all(thread.daemon for thread in under_way)


def test_an_error_does_not_wait_for_the_rest():
    with serving(with_status(400), slow, slow) as service:
        reward = RemoteReward(service.url, batch_size=1, concurrency=1, **QUICK)
        with pytest.raises(RemoteRewardError, match="status 400"):
            reward(images(), ["a"] * 3)
        assert len(service.asked) < 3


def test_what_is_sent():
    """PNG or JPEG, texts or nothing, and the headers."""
    with serving() as service:
        RemoteReward(service.url, headers={"Authorization": "Bearer 1234"})(images(), ["a", None, "c"])
        jpeg = RemoteReward(service.url, format="jpeg")(images(), ["a"] * 3)
        (path, headers, body), (_, _, other) = service.asked
    assert path == "/score"
    assert headers["Authorization"] == "Bearer 1234"
    assert body["prompts"] == ["a", None, "c"]
    formats = [Image.open(io.BytesIO(base64.b64decode(one["images"][0]))).format for one in (body, other)]
    assert formats == ["PNG", "JPEG"]
    assert (jpeg - mean(images(), None)).abs().max() < 2


def test_where_it_is_sent(tmp_path, monkeypatch):
    """A query follows the path; a redirection is not followed; nothing of ~/.netrc replaces the header."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password other")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with serving() as service:
        RemoteReward(f"{service.url}/v1/?version=2", headers={"Authorization": "Bearer 1234"})(images(1), ["a"])
        ((path, headers, _),) = service.asked
        assert path == "/v1/score?version=2"
        assert headers["Authorization"] == "Bearer 1234"
    with serving(good=with_status(307, ("Location", "http://elsewhere/"))) as service:
        with pytest.raises(RemoteRewardError, match="asked once .* status 307, it is elsewhere: name the address"):
            RemoteReward(service.url)(images(1), ["a"])
        with pytest.raises(RemoteRewardError, match="asked once .* no such request can be made") as raised:
            RemoteReward(service.url, headers={"Authorization": "Bearer s3cret\n"})(images(1), ["a"])
        assert "s3cret" not in str(raised.value)


def test_name_and_password_of_an_address():
    with serving() as service:
        address = service.url.replace("http://", "http://me:p%40ss@")
        RemoteReward(address)(images(1), ["a"])
        RemoteReward(address, headers={"Authorization": "Bearer 1234"})(images(1), ["a"])
        sent = [headers["Authorization"] for _, headers, _ in service.asked]
    assert sent == ["Basic " + base64.b64encode(b"me:p@ss").decode(), "Bearer 1234"]


def test_pictures_and_prompts_are_checked():
    pictures = [
        Image.new("RGB", size, colour) for size, colour in (((6, 4), "red"), ((6, 4), "white"), ((3, 3), "blue"))
    ]
    with serving() as service:
        reward = RemoteReward(service.url)
        assert reward(pictures, "abc"[:0] or ["a", "b", "c"]).tolist() == pytest.approx([100 / 3, 100, 100 / 3])
        assert [
            len(body["images"]) for _, _, body in sorted(service.asked, key=lambda one: -len(one[2]["images"]))
        ] == [2, 1]
        assert reward(images()).shape == (3,)
        for given, prompts, message in (
            (images(), "cat", "prompts: expected one for each image, 3, got 1"),
            (images(), ["a"] * 6, "prompts: expected one for each image, 3, got 6"),
            (images() * float("nan"), ["a"] * 3, r"images: expected values in \[0, 1\], got nan"),
            (2 * images(), ["a"] * 3, r"images: expected values in \[0, 1\]"),
            (torch.rand(2, 4, 8, 8), ["a"] * 2, r"images: expected shape \(N, 3, H, W\)"),
        ):
            with pytest.raises(ValueError, match=message):
                reward(given, prompts)


def test_secrets_are_not_told(flux, tmp_path):
    """Neither by the reward, nor in errors, nor in what is saved."""
    with serving() as service:
        url = service.url.replace("http://", "http://me:s3cret@") + "/?key=s3cret"
        reward = RemoteReward(url, headers={"Authorization": "Bearer s3cret"}, retries=0, reward_scale=300.0)
        out = flux.steer(reward=RemoteReward(service.url, headers={"X": "s3cret"}, reward_scale=300.0))
        assert "s3cret" not in (out.save(tmp_path) / "steering.json").read_text()
    with pytest.raises(RemoteRewardError) as raised:
        reward(images(), ["a"] * 3)
    assert "s3cret" not in repr(reward)
    error = raised.value
    while error is not None:
        assert "s3cret" not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_the_server_tells_its_scale(flux):
    with serving() as service:
        reward = RemoteReward(service.url, **QUICK)
        assert flux.steer(reward=reward, reward_scale=None).reward_scale.tolist() == [25.0]
        assert reward.reward_scale == 25
        assert RemoteReward(service.url, reward_scale=2.0).load().reward_scale == 2
        reward = RemoteReward(service.url)
        reward.reward_scale = 3.0
        assert reward.load().reward_scale == 3


def test_copies_and_bad_options():
    reward = RemoteReward("http://judge:8000/", concurrency=2)
    for other in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert repr(other) == "RemoteReward('http://judge:8000')"
        assert other.service._slots.number == 2
    bad = [
        ({"url": "judge:8000"}, "url: expected one that begins with http"),
        ({"format": "gif"}, "format: expected one of"),
        ({"batch_size": 0}, "batch_size: expected a whole number from 1"),
        ({"concurrency": 0}, "concurrency: expected a whole number from 1"),
        ({"retries": -1}, "retries: expected a whole number from 0"),
        ({"timeout": 0}, "timeout, backoff: expected positive seconds"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            RemoteReward(**{"url": "http://judge", **options})
    with pytest.raises(ValueError, match="images require a gradient; RemoteReward has none"):
        reward(images().requires_grad_(), ["a"] * 3)
    with pytest.raises(ValueError, match=r"images: expected shape \(N, 3, H, W\), got \(2, 1, 100\)"):
        reward(torch.rand(2, 1, 100), ["a"] * 2)


# ---- the server ------------------------------------------------------------------------------------------------------


@contextmanager
def offering(reward, token=None):
    """Run the application in a thread; yields its address."""
    uvicorn = pytest.importorskip("uvicorn")
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app(reward, token), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def test_the_server_scores_what_the_reward_scores():
    """Images and videos, as the reward is given them here, to what bytes round."""
    seen = []

    def reward(given, prompts):
        seen.append((given, prompts))
        return mean(given, prompts)

    reward.reward_scale = 7.0
    video = torch.rand(2, 4, 3, 6, 8, generator=tiny.seeded())
    with offering(reward) as url:
        remote = RemoteReward(url).load()
        assert remote.reward_scale == 7
        torch.testing.assert_close(remote(images(), ["a", None, "c"]), mean(images(), None).double())
        torch.testing.assert_close(remote(video, ["a", "b"]), mean(video, None).double(), rtol=0, atol=0.1)
        assert requests.get(url, timeout=5).json() == {"reward": "reward", "reward_scale": 7.0}
    assert seen[0][1] == ["a", None, "c"]
    assert torch.equal(seen[0][0], images())
    torch.testing.assert_close(seen[1][0], video, rtol=0, atol=0.6 / 255)


def test_the_server_says_what_is_wrong(monkeypatch):
    returned = []

    def fails(given, prompts):
        if not returned:
            raise RuntimeError("out of memory")
        return returned[-1]

    picture = base64.b64encode(b"no picture").decode()
    with offering(fails, token="s3cret") as url:
        with pytest.raises(RemoteRewardError, match="status 401, .*expected Authorization: Bearer"):
            RemoteReward(url, headers={"Authorization": "Bearer other"}).load()
        bearing = {"Authorization": "Bearer s3cret"}
        with pytest.raises(RemoteRewardError, match="asked 2 times .* status 500, .*RuntimeError: out of memory"):
            RemoteReward(url, headers=bearing, retries=1, **QUICK)(images(), ["a"] * 3)
        for body, message in (
            ({"images": [picture], "prompts": ["a"]}, "images: expected PNG or JPEG in base64"),
            ({"images": [], "prompts": []}, "expected one prompt for each image, got 0 images and 0 prompts"),
            ({"images": [[], []], "prompts": ["a", "b"]}, "images: expected videos of at least one frame"),
            ({"images": [picture]}, 'expected {"images": [picture, …], "prompts": [text, …]}'),
            ([picture], 'expected {"images": [picture, …], "prompts": [text, …]}'),
        ):
            answer = requests.post(f"{url}/score", json=body, headers=bearing, timeout=5)
            assert answer.status_code == 422
            assert message in answer.json()["error"]
        answer = requests.post(f"{url}/score", data="{", headers=bearing, timeout=5)
        assert "expected JSON" in answer.json()["error"]
        reward = RemoteReward(url, headers=bearing, **QUICK)
        for value, message in (
            ([1.0, float("nan"), 2.0], "reward returned .*nan.*expected finite scores"),
            (torch.ones(3, 1), r"reward returned shape \(3, 1\); expected one score per image"),
            (None, "reward returned None"),
        ):
            returned.append(value)
            with pytest.raises(RemoteRewardError, match=f"asked once .* status 422, .*{message}"):
                reward(images(), ["a"] * 3)
        returned.append([16777217.0, 1000000.01, 0.1])
        assert reward(images(), ["a"] * 3).tolist() == returned[-1]
        monkeypatch.setattr(serve, "MOST_PIXELS", 100)
        with pytest.raises(RemoteRewardError, match="expected at most 100 pixels in a request, got 1800: send fewer"):
            reward(images(), ["a"] * 3)


def test_what_is_not_served():
    for name, message in (
        ("custom_reward:Tensor", "expected an object, got the class Tensor: write Tensor()"),
        ("test_remote:RANKED", "expected one that scores an image by itself, got Ranked"),
        ("math:pi", "expected a function of images and prompts, got float"),
    ):
        with pytest.raises(SystemExit, match=message.replace("(", r"\(").replace(")", r"\)")):
            main(["serve", name])


RANKED = Ranked(mean)


def started(folder, port):
    """Start `python -m glassflows.serve` in a process of its own."""
    command = [sys.executable, "-m", "glassflows.serve", "judge:brightness", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(Path(glassflows.__file__).parents[1])}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again_in_mid_run(flux, tmp_path):
    pytest.importorskip("uvicorn")
    lines = ["def brightness(images, prompts):", "    return 1000 * images.flatten(1).mean(1)"]
    (tmp_path / "judge.py").write_text("\n".join([*lines, "brightness.reward_scale = 3.0"]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    servers = [started(tmp_path, port)]
    remote = RemoteReward(f"http://127.0.0.1:{port}", retries=9, backoff=0.25)  # two minutes at the most
    calls = []

    def reward(given, prompts):
        calls.append(len(calls))
        if len(calls) == 2:
            servers[0].kill()
            servers[0].wait()
            servers.append(started(tmp_path, port))
        return remote(given, prompts)

    try:
        remote.load()
        assert remote.reward_scale == 3
        out = flux.steer(reward=reward, reward_scale=3.0)
    finally:
        for server in servers:
            server.kill()
            server.wait()
    assert len(calls) == 3
    expected = flux.steer(reward=lambda given, prompts: 1000 * given.flatten(1).mean(1), reward_scale=3.0)
    torch.testing.assert_close(out.rewards, expected.rewards, rtol=0, atol=1.0)


# ---- chat servers ----------------------------------------------------------------------------------------------------


def completion(text, *tops):
    """Return a deed: an answer with a text and the log-probabilities of the likeliest first tokens."""
    top = [{"token": token, "logprob": float(np.log(chance))} for token, chance in tops]
    content = [{"token": tops[0][0], "logprob": top[0]["logprob"], "top_logprobs": top}] if tops else None
    choice = {"message": {"content": text}, "logprobs": {"content": content} if content else None}
    return lambda handler, body: handler.answer(200, {"choices": [choice]})


def without_logprobs(then):
    """Return a deed: refuse log-probabilities, as some servers do."""

    def deed(handler, body):
        if "logprobs" in body:
            return handler.answer(400, {"error": "logprobs are not supported"})
        return then(handler, body)

    return deed


def test_chat_by_log_probabilities():
    answer = completion("Yes", ("Yes", 0.5), (" yes", 0.1), ("No", 0.15), ("no", 0.05), ("Maybe", 0.2))
    with serving(with_status(500), good=answer) as service:
        reward = ChatReward(f"{service.url}/v1/", "judge", api_key="s3cret", **QUICK)
        assert reward(images(), ["a cat", "a dog", "a fox"]).tolist() == pytest.approx([0.75] * 3)
        paths, headers, bodies = zip(*service.asked, strict=True)
    assert set(paths) == {"/v1/chat/completions"}
    assert headers[0]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in repr(reward)
    asked = {body["messages"][0]["content"][1]["text"] for body in bodies}
    assert asked == {f'Does this image show "{one}"? Answer Yes or No.' for one in ("a cat", "a dog", "a fox")}
    body = bodies[0]
    assert (body["model"], body["logprobs"], body["top_logprobs"], body["max_tokens"]) == ("judge", True, 20, 1)
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    ("text", "score"), [("Yes.", 1.0), ("**No**, it is a dog", 0.0), ("There are 3 cats, so yes", 1.0)]
)
@pytest.mark.parametrize("server", [lambda answer: answer, without_logprobs], ids=["gives none", "refuses them"])
def test_chat_by_words(text, score, server):
    """Where a server gives no log-probabilities, or refuses them, which is asked once and said once."""
    with serving(good=server(completion(text))) as service:
        reward = ChatReward(service.url, "judge", **QUICK)
        with pytest.warns(UserWarning, match="gives no log-probabilities: it is asked in words"):
            assert reward(images(1), ["a"]).tolist() == [score]
        assert len(service.asked) == 2
        assert reward(images(1), ["a"]).tolist() == [score]
        assert len(service.asked) == 3


@pytest.mark.parametrize("status", [404, 400])
def test_chat_goes_on_weighing_after_a_failure(status):
    answer = completion("Yes", ("Yes", 0.6), ("No", 0.4))
    with serving(answer, with_status(status), good=answer) as service:
        reward = ChatReward(service.url, "judge", **QUICK)
        assert reward(images(1), ["a"]).tolist() == pytest.approx([0.6])
        with pytest.raises(RemoteRewardError, match=f"status {status}"):
            reward(images(1), ["a"])
        assert reward(images(1), ["a"]).tolist() == pytest.approx([0.6])


@pytest.mark.parametrize(
    ("text", "number"),
    [("7.5/10", 7.5), ("Score: -3", -3.0), ("I would say 7 out of 10.", 7.0), ("1,000", 1000.0), (".5", 0.5),
     ("\N{MINUS SIGN}3", -3.0), ("Rating (out of 10): 7", 7.0),
     ("8.5/10.0", 8.5), ("3 out of 5.0", 3.0), ("7,5", 7.5), ("7,5 von 10", None),
     ("8 or 9", None), ("none", None), ("9" * 400, None)],
)  # fmt: skip
def test_chat_by_numbers(text, number):
    with serving(good=completion(text)) as service:
        reward = ChatReward(service.url, "judge", numbers=True, **QUICK)
        if number is not None:
            assert reward(images(1), ["a"]).tolist() == [number]
            return
        with pytest.raises(RemoteRewardError, match="expected one number, got"):
            reward(images(1), ["a"])
        assert len(service.asked) == 1


def test_chat_of_videos_and_fields():
    """All frames in one message; a field of one's own, and none of a default."""
    film = torch.rand(1, 3, 3, 6, 8, generator=tiny.seeded())
    with serving(good=completion("Yes", ("Yes", 0.9), ("No", 0.1))) as service:
        body = {"max_tokens": None, "max_completion_tokens": 1}
        reward = ChatReward(service.url, "judge", "Is it good?", body=body, format="jpeg")
        assert reward(film, [None]).tolist() == pytest.approx([0.9])
        (_, _, sent), *_ = service.asked
    kinds = [part["type"] for part in sent["messages"][0]["content"]]
    assert kinds == ["image_url"] * 3 + ["text"]
    assert "max_tokens" not in sent
    assert sent["max_completion_tokens"] == 1


def test_chat_that_answers_nothing_of_the_kind():
    """Is not asked again, unless the answer is none at all."""
    for answer, times, message in (
        (completion("Well", ("Well", 0.9), ("<think>", 0.1)), 1, "expected Yes or No first, got 'Well', '<think>'"),
        (completion("Well"), 2, "expected Yes or No, got 'Well'"),
        (completion("yes and no"), 2, "expected Yes or No, got 'yes and no'"),
        (completion(None), 2, "expected Yes or No, got ''"),
        (lambda handler, body: handler.answer(200, {"choices": []}), 2, "an answer that cannot be read"),
    ):
        with serving(good=answer) as service:
            with pytest.raises(RemoteRewardError, match=message):
                ChatReward(service.url, "judge", retries=1, **QUICK)(images(1), ["a"])
            assert len(service.asked) == times
    with pytest.raises(ValueError, match="prompts: expected texts, which the question repeats, got None"):
        ChatReward("http://judge", "judge")(images(), [None] * 3)
    with pytest.raises(ValueError, match="answers: expected two words"):
        ChatReward("http://judge", "judge", answers=("Very good", "Bad"))


def test_chat_steers(flux):
    def brightness(handler, body):
        text = body["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]
        chance = float(np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).mean()) / 255
        completion("Yes", ("Yes", chance), ("No", 1 - chance))(handler, body)

    with serving(good=brightness) as service:
        out = flux.steer(reward=ChatReward(service.url, "judge"), reward_scale=300.0)
    np.testing.assert_allclose(out.image_rewards, out.images.mean((1, 2, 3)), atol=3e-3)
