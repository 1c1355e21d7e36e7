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


def metadata(wheel):
    """Return what a wheel says of itself, its README included."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith("METADATA"))
        return archive.read(name).decode()


@pytest.mark.slow
def test_release(tmp_path):
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT)  # an sdist, and a wheel from it
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    assert wheel.name == f"glassflows-{glassflows.__version__}-py3-none-any.whl"
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    assert "\nProject-URL: " not in metadata(wheel)
    assert "(docs/demo.png)" in metadata(wheel)
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
    monkeypatch.setenv("GLASSFLOWS_REPOSITORY", address)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT)
    told = metadata(*tmp_path.glob("*.whl"))
    assert f"\nProject-URL: Repository, {address}\n" in told
    assert f"![Contact sheet of the demo]({address}/raw/v{glassflows.__version__}/docs/demo.png)" in told
    links = re.findall(r"\]\((.*?)\)", told)
    assert len(links) > 20
    assert not [link for link in links if not link.startswith("https://")]


@pytest.mark.parametrize(("name", "written"), [("CHANGELOG.md", "\n## {}"), ("CITATION.cff", "\nversion: {}\n")])
def test_what_names_the_version_names_this_one(name, written):
    assert written.format(glassflows.__version__) in (ROOT / name).read_text()
