"""The scripts that tune and edit, at their smallest."""

import sys

import diffusers
import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState

import edit
import finetune
import tiny
from glassflows import Rollouts, Steerer
from scenes import CALL, load_pipeline
from scenes.grammar import parse
from scenes.verifier import find_objects, verdicts

pytestmark = [pytest.mark.slow, tiny.TRANSFORMERS_5]


@pytest.fixture(autouse=True)
def _leave_nothing():
    """Undo what a script does to its process: how loud libraries are, and what accelerate has begun."""
    levels = {library: library.utils.logging.get_verbosity() for library in (diffusers, transformers)}
    yield
    for library, level in levels.items():
        library.utils.logging.set_verbosity(level)
        library.utils.logging.enable_progress_bar()
    AcceleratorState._reset_state(reset_partial_state=True)


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_finetune(tmp_path, monkeypatch, capsys):
    """The LoRA that it saves is loaded by diffusers and draws other images; draws are kept for the next run."""
    small = ("--prompts", 4, "--draws", 2, "--steps", 3, "--batch", 4, "--report", 2, "--rank", 4, "--out", tmp_path)
    run(finetune, monkeypatch, *small)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table] == ["", "---", "untuned", "round 1"]
    assert len({line.count("|") for line in table}) == 1
    folder = tmp_path / "seed-0"
    drawn = Rollouts(folder / "round-0")
    assert len(drawn) == 8
    assert {len(set(parse(row["prompt"]).kinds)) for row in drawn} == {4}
    assert not any(parse(row["prompt"]).is_held_out for row in drawn)

    pipe, call = load_pipeline(), {"num_inference_steps": 4, "output_type": "pt", **CALL}
    before = pipe("a red circle", generator=tiny.seeded(), **call).images
    pipe.load_lora_weights(folder)
    after = pipe("a red circle", generator=tiny.seeded(), **call).images
    assert not torch.allclose(before, after, atol=1e-4)

    def refuse(*args, **kwargs):
        raise AssertionError("drawn again")

    monkeypatch.setattr(Steerer, "__call__", refuse)
    monkeypatch.setattr(finetune, "report", lambda *args: None)
    run(finetune, monkeypatch, *small)
    with pytest.raises(SystemExit, match="draws of other settings"):
        run(finetune, monkeypatch, *small, "--scale", 3)


def test_the_loss_is_that_of_the_data():
    """It is lower on what the model was trained on than on other latents of the same size."""
    pipe, prompts = load_pipeline(), finetune.prompts_of_four(8)
    call = {"num_inference_steps": 8, "output_type": "latent", "generator": tiny.seeded(), **CALL}
    z = pipe(prompts, **call).images
    torch.manual_seed(0)
    with torch.no_grad():
        losses = [float(finetune.loss_of(pipe, one, prompts)) for one in (z, z.roll(1, 0), torch.randn_like(z))]
    assert losses[0] < losses[1] < losses[2]


def test_edits_are_what_they_say():
    edits = edit.drawn_edits(12, seed=1)
    assert verdicts(edits.pictures.numpy(), edits.before).all()
    assert not verdicts(edits.pictures.numpy(), edits.prompts).any()
    for old, new, picture, there in zip(edits.before, edits.prompts, edits.pictures, edits.objects, strict=True):
        gone, come = (set(parse(one).kinds) - set(parse(other).kinds) for one, other in ((old, new), (new, old)))
        (was,), (is_,) = gone, come
        assert was[1] == is_[1]  # the shape
        (found,) = [one for one in find_objects(picture.numpy()) if one.kind == was]
        rows, columns = np.nonzero(there[0].numpy())
        assert rows.min() <= found.y <= rows.max() + 1
        assert columns.min() <= found.x <= columns.max() + 1


def test_edit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(edit, "STRENGTHS", (0.5,))
    monkeypatch.setattr(edit, "SCALES", (1.0,))
    run(edit, monkeypatch, "--edits", 2, "--choosing", 1, "--seeds", 1, "--out", tmp_path / "sheet.png")
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(edit.METHODS)
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
