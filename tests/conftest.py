"""The tests download nothing, and say so at once where something would; fixtures of pipelines at toy size."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import pytest
from packaging.version import Version

import tiny
import toy_rewards

if Version(diffusers.__version__) < Version("0.42"):  # the zoo is built of its classes
    collect_ignore_glob = ["zoo/*"]


@pytest.fixture
def flux():
    return tiny.Toy(tiny.flux)


@pytest.fixture
def sd():
    return tiny.Toy(tiny.sd)


@pytest.fixture(params=[tiny.flux, tiny.sd])
def toy(request):
    """A toy of each family."""
    return tiny.Toy(request.param)


@pytest.fixture(params=[tiny.flux_img2img, tiny.sd_img2img])
def img2img(request):
    return tiny.Toy(request.param)


@pytest.fixture(params=[tiny.flux_inpaint, tiny.sd_inpaint])
def inpaint(request):
    return tiny.Toy(request.param)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder with a checkpoint of toy size for each reward."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: write(root / name) for name, (_, write) in toy_rewards.KINDS.items()}
