"""Every python block of the READMEs runs. Where one would download a model, the scenes pipeline takes its place."""

import re
from pathlib import Path

import pytest
import torch

import checkpoints
import tiny

ROOT = Path(__file__).parents[1]
IN_PLACE_OF = {  # what stands in the README: what runs here
    'FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16).to("cuda")': (
        "load_pipeline()"
    ),
    'CLIPScore(device="cuda")': "CLIPScore(CLIP)",
    'PickScore.from_pretrained("yuvalkirstain/PickScore_v1", device="cuda")': "PickScore.from_pretrained(CLIP)",
    "PickScore()": "PickScore(CLIP)",
    "AestheticScore()": "AestheticScore(AESTHETIC)",
    'AutoencoderTiny.from_pretrained("madebyollin/taef1")': "AutoencoderTiny(latent_channels=4)",
    "height=768": "height=32",
    '"height": 768, "width": 1360': '"height": 32, "width": 32',
    "width=1360": "width=32, max_sequence_length=18",
}


@pytest.mark.slow
@tiny.TRANSFORMERS_5
@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        "docs/editing.md",
        "docs/finetuning.md",
        "docs/hooks.md",
        "docs/index.md",
        "docs/many_gpus.md",
        "docs/rewards.md",
        "docs/scenes.md",
        "docs/start.md",
        "docs/steering.md",
    ],
)
def test_blocks_run(path, monkeypatch, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / path).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    monkeypatch.chdir(ROOT)
    names = {"images": torch.rand(2, 3, 32, 32), "prompts": ["a red circle", "two blue squares"], "torch": torch}
    names["AESTHETIC"] = checkpoints.aesthetic(tmp_path / "aesthetic")
    exec("from scenes import CLIP, load_pipeline, load_reward", names)
    if path not in ("README.md", "docs/scenes.md"):  # they begin with a pipeline and a reward at hand
        exec("pipe, reward = load_pipeline(), load_reward()", names)
    for block in blocks:
        for written, run in IN_PLACE_OF.items():
            block = block.replace(written, run)
        block = re.sub(r'(\.save|\.savefig|Rollouts)\("(.*?)"\)', lambda m: f'{m[1]}("{tmp_path}/{m[2]}")', block)
        exec(compile(block, path, "exec"), names)


def test_substitutions_are_still_needed():
    text = "".join((ROOT / name).read_text() for name in ("README.md", "docs/hooks.md", "docs/rewards.md"))
    assert all(written in text for written in IN_PLACE_OF)


def test_names_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text
