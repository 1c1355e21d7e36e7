"""Every pipeline class of the zoo does what docs/pipelines.md says."""

import pytest

pytest.importorskip("diffusers", minversion="0.42")  # older ones build other pipelines

from zoo.survey import DOCUMENT, cases, documented, sampled, survey

WARNINGS = [  # of diffusers' and torch's own making
    "ignore::FutureWarning",
    "ignore:In CPU autocast:UserWarning",
    "ignore:flex_attention called without:UserWarning",
]
pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(warning) for warning in WARNINGS)]


@pytest.mark.parametrize("label", sampled(sorted(cases()), every=12))
def test_pipeline(label):
    assert survey(cases()[label]) == documented()[label]


def test_document_is_complete():
    assert set(cases()) == set(documented())


def test_readme_counts_as_the_document_does():
    runs = {}
    for row in documented().values():
        name = row.pipeline.split(",")[0]
        runs[name] = runs.get(name, False) or row.swap.startswith("yes")
    text = (DOCUMENT.parents[1] / "README.md").read_text()
    assert f"of {len(runs)} classes of diffusers at toy size {sum(runs.values())} run" in text
