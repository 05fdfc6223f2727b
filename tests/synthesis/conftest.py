"""What the tests of synthesis share: a tiny pipeline, source images with the labels of the test's module, and sets."""

import pytest

from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.synthesis import SynthesisSettings, plan_interpolation, plan_reconstruction, synthesise
from synthetic_sets import LABELS, SETTINGS


@pytest.fixture(scope="module")
def pipe():
    import tiny

    return tiny.tiny_pipeline()


@pytest.fixture(scope="module")
def sources(request, tmp_path_factory):
    """One image for each of the module's LABELS, or of those that sets share."""
    from scripts import image_folder

    folder = image_folder(tmp_path_factory.mktemp("sources"), len(getattr(request.module, "LABELS", LABELS)), 32)
    return open_images(folder, Preprocessing(32))


@pytest.fixture(scope="module")
def plan(sources):
    return plan_interpolation(sources.keys, LABELS, num_images=21, settings=SETTINGS)


@pytest.fixture(scope="module")
def whole(plan, pipe, sources, tmp_path_factory):
    """A set that was made without a stop."""
    return synthesise(plan, pipe, sources, tmp_path_factory.mktemp("whole") / "set", progress=False)


@pytest.fixture(scope="module")
def small(sources):
    """A plan of two shards."""
    settings = SynthesisSettings(num_inference_steps=1, batch_size=2, shard_size=2, threads=1)
    return plan_reconstruction(sources.keys, LABELS, num_images=3, settings=settings)
