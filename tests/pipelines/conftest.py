"""The pipelines as fixtures: each of the three, and those that generate images."""

import pytest
from kinds import KINDS


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(params=[name for name, kind in KINDS.items() if kind.generates])
def generating(request):
    return KINDS[request.param]
