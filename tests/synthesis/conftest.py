"""What the tests of synthesis share: a tiny pipeline, and source images with the labels of the test's module."""

import pytest

from diffusers_dino.data import Preprocessing, open_images


@pytest.fixture(scope="module")
def pipe():
    import tiny

    return tiny.tiny_pipeline()


@pytest.fixture(scope="module")
def sources(request, tmp_path_factory):
    """One image for each of the module's LABELS."""
    from scripts import image_folder

    folder = image_folder(tmp_path_factory.mktemp("sources"), len(request.module.LABELS), 32)
    return open_images(folder, Preprocessing(32))
