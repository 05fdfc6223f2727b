"""The pipelines as fixtures: each of the three, and those that generate images."""

import pytest
from kinds import KINDS


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(params=[name for name, kind in KINDS.items() if kind.generates])
def generating(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A scanner's and a ward's adapter, of ranks 4 and 2."""
    from adapters import save_adapter

    root = tmp_path_factory.mktemp("adapters")
    return {
        "scanner": save_adapter(root / "scanner", 0),
        "ward": save_adapter(root / "ward", 1, rank=2),
        "dora": save_adapter(root / "dora", 2, use_dora=True),
    }


@pytest.fixture
def adapted(pipe, folders):
    for name in ("scanner", "ward"):
        pipe.load_lora_weights(folders[name], adapter_name=name)
    return pipe
