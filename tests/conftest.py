"""Shared by all tests: no network, a share of the cores, and the tiny components of `tiny.py` as fixtures.

The fixtures import `tiny` where they use it, so that tests that need no model start at once.
"""

import os

import pytest


def pytest_configure():
    """Set what libraries read on import: no network, no bars of pipelines, and a share of the cores."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))} if processes > 1 else {}
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
    for name, value in (quiet | threads).items():
        os.environ.setdefault(name, value)


def pytest_collection_modifyitems(items):
    """Files with slow tests go first, so that processes which share the tests end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item):
    """Tests of a GPU are skipped without one."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.fixture
def unet():
    import tiny

    return tiny.tiny_unet()


@pytest.fixture(params=[1, 3], ids=["gray", "rgb"])
def vae(request):
    import tiny

    return tiny.tiny_vae(request.param)


@pytest.fixture
def scheduler():
    import tiny

    return tiny.tiny_scheduler()


@pytest.fixture
def conditioner():
    import tiny

    return tiny.tiny_conditioner()


@pytest.fixture
def pipe():
    import tiny

    return tiny.tiny_pipeline()


@pytest.fixture
def images():
    """Four RGB images (4, 3, 32, 32) in [0, 1]."""
    import tiny

    return tiny.random_images(4)
