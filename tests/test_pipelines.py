"""Every pipeline class of the zoo does what docs/pipelines.md says."""

import diffusers
import pytest

from zoo.survey import cases, documented, survey

WARNINGS = [  # of diffusers' and torch's own making
    "ignore::FutureWarning",
    "ignore:In CPU autocast:UserWarning",
    "ignore:flex_attention called without:UserWarning",
]
pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]


@pytest.mark.parametrize("label", sorted(cases()))
def test_pipeline(label):
    row = survey(cases()[label])
    if diffusers.__version__ >= "0.42":  # older ones differ here and there
        assert row == documented()[label]


def test_document_is_complete():
    assert set(cases()) <= set(documented())
