"""The tests download nothing, and say so at once where something would; fixtures of pipelines at toy size.

Torch is imported within the fixtures: the process that only deals out tests to others does without it.
"""

import builtins
import os
import sys
from importlib.metadata import version

import pytest
from packaging.version import Version

os.environ["HF_HUB_OFFLINE"] = "1"

if Version(version("diffusers")) < Version("0.42"):  # the zoo is built of its classes
    collect_ignore_glob = ["zoo/*"]


def made(name):
    import tiny

    return tiny.Toy(getattr(tiny, name))


@pytest.fixture
def flux():
    return made("flux")


@pytest.fixture
def sd():
    return made("sd")


@pytest.fixture(params=["flux", "sd"])
def toy(request):
    """A toy of each family."""
    return made(request.param)


@pytest.fixture(params=["flux_img2img", "sd_img2img"])
def img2img(request):
    return made(request.param)


@pytest.fixture(params=["flux_inpaint", "sd_inpaint"])
def inpaint(request):
    return made(request.param)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder with a checkpoint of toy size for each reward."""
    import toy_rewards

    root = tmp_path_factory.mktemp("checkpoints")
    return {name: write(root / name) for name, (_, write) in toy_rewards.KINDS.items()}


@pytest.fixture
def no_matplotlib(monkeypatch):
    """Make matplotlib impossible to import, as where it is not installed."""
    load = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return load(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "glassflows.steering.plotting", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
