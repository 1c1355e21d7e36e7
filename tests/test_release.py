"""What is released: a wheel that works by itself, and an sdist that builds it."""

import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import glassflows

ROOT = Path(__file__).parents[1]
USE = """
import glassflows, torch
from glassflows import GLASSScheduler, rewards, sample
from diffusers import DDIMScheduler
assert glassflows.__file__.startswith({site!r}), glassflows.__file__
scheduler = GLASSScheduler.from_scheduler(DDIMScheduler(), num_transitions=2)
scheduler.set_timesteps(4)
print(glassflows.__version__, len(scheduler.timesteps))
print(sample(lambda x, t: 0 * x, torch.randn(2, 3), num_steps=2, num_transitions=1).shape)
"""


def run(*command, **options):
    done = subprocess.run([str(one) for one in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(folder):
    """Build an sdist, and a wheel from it."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)


@pytest.mark.slow
def test_release(tmp_path):
    build(tmp_path)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    assert wheel.name == f"glassflows-{glassflows.__version__}-py3-none-any.whl"
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert modules | {"glassflows/py.typed"} <= names
    assert not [name for name in names if not name.startswith("glassflows")]
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames()}
    assert tops == {
        "src",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "PKG-INFO",
        "pyproject.toml",
        "hatch_build.py",
        ".gitignore",
    }

    venv.create(tmp_path / "venv", with_pip=False)
    folder = next((tmp_path / "venv").glob("lib/python*/site-packages"), tmp_path / "venv/Lib/site-packages")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel)
    needed = next(Path(one) for one in sys.path if (Path(one) / "torch").is_dir())
    (folder / "needed.pth").write_text(f"{needed}\n")  # the wheel's own comes first
    python = next((tmp_path / "venv").glob("[bS]*/python*"))
    told = run(python, "-I", "-W", "error", "-c", USE.format(site=str(folder)), cwd=tmp_path)
    assert told.split()[:2] == [glassflows.__version__, "4"]


@pytest.mark.slow
def test_a_release_says_where_it_lies_if_that_is_told(tmp_path, monkeypatch):
    address = "https://github.com/someone/glassflows"
    told = {}
    for name in ("", address):
        monkeypatch.setenv("GLASSFLOWS_REPOSITORY", name)
        build(tmp_path / str(len(name)))
        (wheel,) = (tmp_path / str(len(name))).glob("*.whl")
        (metadata,) = (one for one in zipfile.ZipFile(wheel).namelist() if one.endswith("METADATA"))
        told[name] = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "\nProject-URL: " not in told[""]
    assert "(docs/demo.png)" in told[""]
    assert f"Project-URL: Repository, {address}\n" in told[address]
    assert f"![Contact sheet of the demo]({address}/raw/v{glassflows.__version__}/docs/demo.png)" in told[address]
    links = re.findall(r"\]\((.*?)\)", told[address])
    assert len(links) > 20
    assert not [link for link in links if not link.startswith("https://")]


@pytest.mark.parametrize(("name", "written"), [("CHANGELOG.md", "\n## {}"), ("CITATION.cff", "\nversion: {}\n")])
def test_what_names_the_version_names_this_one(name, written):
    assert written.format(glassflows.__version__) in (ROOT / name).read_text()
