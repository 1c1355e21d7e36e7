"""HPSv2, whose checkpoint is open_clip's, against the published architecture."""

import copy

import torch
from transformers import AutoTokenizer

from glassflows.rewards import HPSv2
from published import OpenCLIP
from toy_rewards import PROMPTS, WARNINGS, images, load, pixels

pytestmark = WARNINGS


def test_hpsv2_is_the_published_architecture(folders):
    """The names and shapes of open_clip, and images padded rather than cropped."""
    published = OpenCLIP()
    state = torch.load(folders["HPSv2"] / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    published.load_state_dict({name: value.float() for name, value in state.items()})
    pictures = images(3, 16, 10)
    seen = pixels(torch.nn.functional.pad(pictures, (3, 3)))
    ids = AutoTokenizer.from_pretrained(folders["HPSv2"])(PROMPTS, padding=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = published.cosine(seen, ids)
    torch.testing.assert_close(load("HPSv2", folders)(pictures, PROMPTS), expected, rtol=0, atol=1e-5)
    swapped = copy.deepcopy(published)
    for block in swapped.transformer.resblocks:  # the oracle tells the projections of queries and keys apart
        weight = block.attn.in_proj_weight.data
        weight.copy_(torch.cat([weight[32:64], weight[:32], weight[64:]]))
    with torch.no_grad():
        assert (swapped.cosine(seen, ids) - expected).abs().max() > 1e-3


def test_hpsv2_reads_models_of_transformers_and_files(folders, tmp_path):
    reward = HPSv2.from_pretrained(folders["CLIPScore"])  # version 2.0 is a CLIPModel
    assert reward(images(), PROMPTS).abs().max() <= 1
    file = folders["HPSv2"] / "HPS_v2.1_compressed.pt"
    alone = HPSv2.from_pretrained(file, processor=folders["HPSv2"])
    assert torch.equal(alone(images(), PROMPTS), load("HPSv2", folders)(images(), PROMPTS))
