"""The command line, on the scenes pipeline."""

import re
import subprocess
import sys

import pytest

import tiny
from glassflows import SteeringResult
from glassflows.commands.main import main
from scenes import CLIP, PIPELINE

STEER = ["steer", "--model", str(PIPELINE), "--steps", "6", "--particles", "4"]
STEER += ["--call", "height=32", "width=32", "max_sequence_length=18"]
BY_CLIP = ["--reward", "clipscore", "--reward-model", str(CLIP)]


@tiny.TRANSFORMERS_5
def test_steer(tmp_path, capsys):
    """One folder for each prompt, with the best image; the same as by the library."""
    file = tmp_path / "prompts.txt"
    file.write_text("two green triangles\n\n")
    main([*STEER, *BY_CLIP, "--prompt", "a red circle", "--prompts", str(file), "--seed", "3", "--out", str(tmp_path)])
    first, second = (SteeringResult.load(tmp_path / name) for name in ("0000", "0001"))
    assert (first.prompts, second.prompts) == (("a red circle",), ("two green triangles",))
    assert len(first.images) == 1
    assert first.images[0].size == (32, 32)
    assert first.recipe["call"]["generator"]["seed"] == 3
    assert first.recipe["steerer"]["num_particles"] == 4
    printed = capsys.readouterr().out
    assert f"reward {float(first.image_rewards[0]):.4g}" in printed
    assert "two green triangles" in printed


@tiny.TRANSFORMERS_5
def test_a_reward_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def redness(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    main(
        [
            *STEER,
            "--reward",
            "mine:redness",
            "--reward-scale",
            "auto",
            "--images",
            "2",
            "--prompt",
            "a red circle",
            "--out",
            "here",
        ]
    )
    out = SteeringResult.load("here/0000")
    assert len(out.images) == 2
    assert out.recipe["reward"] == "redness"
    assert out.recipe["steerer"]["reward_scale"] == "auto"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([*STEER, "--reward", "nice", "--out", "x"], "expected one of clipscore.*or MODULE:NAME, got 'nice'"),
        ([*STEER, "--reward", "nowhere:nice", "--out", "x"], "No module named 'nowhere'"),
        ([*STEER, *BY_CLIP, "--out", "x", "--call", "height"], "expected NAME=VALUE, got 'height'"),
        (["steer", *BY_CLIP, "--out", "x"], "--model"),
        ([], "COMMAND"),
    ],
)
def test_wrong_arguments(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert re.search(complaint, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "glassflows steer: expected --prompt or --prompts"),
        (["--prompts", "nowhere.txt"], "No such file.*nowhere.txt"),
        (["--prompt", "a", "--call", "record=True"], "--call: expected no record"),
        (["--prompt", "a", "--images", "5"], "--images: expected at most --particles 4"),
        (["--prompt", "a", "--model", "nowhere/nothing"], "nowhere/nothing"),
        (["--prompt", "a", "--call", "heigth=32"], "heigth"),
    ],
)
@tiny.TRANSFORMERS_5
def test_what_fails_says_why(arguments, complaint, tmp_path):
    with pytest.raises(SystemExit, match=complaint):
        main([*STEER, *BY_CLIP, "--out", str(tmp_path), *arguments])


def test_other_files_are_seen_before_anything_is_drawn(tmp_path):
    (tmp_path / "0000").mkdir()
    (tmp_path / "0000" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="expected folders of results, got .*0000 with other files"):
        main(["steer", "--model", "nowhere", *BY_CLIP, "--prompt", "a", "--out", str(tmp_path)])


def test_a_function_has_no_checkpoint(tmp_path):
    arguments = ["--reward", "math:sqrt", "--reward-model", "x", "--prompt", "a", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="expected no checkpoint for math:sqrt, a function, got x"):
        main([*STEER, *arguments])


def test_unknown_rewards():
    with pytest.raises(SystemExit, match="verify-rewards: expected some of CLIPScore.*got Nice"):
        main(["verify-rewards", "Nice"])


@pytest.mark.slow
def test_as_a_module():
    answer = subprocess.run([sys.executable, "-m", "glassflows", "--help"], capture_output=True, text=True, check=True)
    assert "steer a pipeline of diffusers by a reward" in answer.stdout
    assert "verify-rewards" in answer.stdout
