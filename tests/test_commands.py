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
        (["verify-rewards", "Nice"], "invalid choice: 'Nice'"),
        ([], "COMMAND"),
    ],
)
def test_wrong_arguments(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert re.search(complaint, capsys.readouterr().err)


def test_no_prompt(tmp_path):
    with pytest.raises(SystemExit, match="expected --prompt or --prompts"):
        main([*STEER, *BY_CLIP, "--out", str(tmp_path)])


@pytest.mark.slow
def test_as_a_module():
    answer = subprocess.run([sys.executable, "-m", "glassflows", "--help"], capture_output=True, text=True, check=True)
    assert "steer a pipeline of diffusers by a reward" in answer.stdout
    assert "verify-rewards" in answer.stdout
