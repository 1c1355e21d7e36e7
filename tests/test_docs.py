"""The site: built without a warning, whole by itself, with every public name in it."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import glassflows
from glassflows import rewards

ROOT = Path(__file__).parents[1]
UNLISTED = {"SchedulerMixin", "rewards"}  # diffusers' own, and a module with a page to itself


class Page(HTMLParser):
    """What a page refers to, what it loads, and the anchors it has."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors.add(given.get("id"))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif given.get("rel") not in ("index", "search", "next", "prev"):
            self.loads += [given[name] for name in ("src", "href") if tag != "a" and name in given]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-W",
            "--keep-going",
            "-q",
            "-d",
            folder / "doctrees",
            "docs",
            folder / "html",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {path: Page(path) for path in (folder / "html").rglob("*.html")}


@pytest.mark.slow
def test_every_link_within_the_site_leads_somewhere(site):
    dangling = []
    for path, page in site.items():
        for link in page.links:
            there = urlsplit(link)
            target = (path.parent / unquote(there.path)).resolve() if there.path else path
            if not there.scheme and not (
                target.exists() and (not there.fragment or unquote(there.fragment) in site[target].anchors)
            ):
                dangling.append((path.name, link))
    assert len(site) > 20
    assert not dangling


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site):
    loads = {load for page in site.values() for load in page.loads}
    assert "_static/logo.svg" in loads
    assert not [load for load in loads if urlsplit(load).scheme not in ("", "data")]
    (home,) = (path.parent for path in site if path.name == "start.html")
    assert not [path for path in home.rglob("*.css") if re.search(r"url\(\W?https?:", path.read_text())]


@pytest.mark.slow
def test_every_public_name_is_explained(site):
    anchors = {anchor for page in site.values() for anchor in page.anchors}
    names = {*glassflows.__all__, *(f"rewards.{name}" for name in rewards.__all__)} - UNLISTED
    assert {f"glassflows.{name}" for name in names} <= anchors


@pytest.mark.slow
def test_formulas_are_drawn_by_the_browser_itself(site):
    (theory,) = (path.read_text() for path in site if path.name == "theory.html")
    assert theory.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') > 15
    assert "<mi>𝒩</mi>" in theory
    assert "\\frac" not in theory
