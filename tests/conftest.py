"""Shared by all tests: no network, no progress bars, and the tiny components of `tiny.py` as fixtures.

The fixtures import `tiny` where they use it, so that tests that need no model start at once.
"""

import os

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # read when huggingface_hub is imported; a test must not wait for a network
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest


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
