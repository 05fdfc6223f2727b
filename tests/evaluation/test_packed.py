import pickle

import numpy as np
import pytest
from PIL import Image

import scripts
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.evaluation.packed import PackedImages, pack_images

PREPROCESSING = Preprocessing(16, remove_borders=False)


@pytest.fixture
def folder(tmp_path):
    return scripts.image_folder(tmp_path / "images", 5, size=32)


def test_packed_images_are_the_prepared_ones(folder, tmp_path):
    images = open_images(folder, PREPROCESSING)
    packed = pack_images(images, tmp_path / "pack.npy")
    assert packed.keys == tuple(images.keys)
    assert packed.array.shape == (5, 16, 16)
    expected = [array for _, array in images.read_many(range(5))]
    assert np.array_equal(packed.array, expected)
    assert np.array_equal(pickle.loads(pickle.dumps(packed)).array, expected)
    color = pack_images(images, tmp_path / "color.npy", channels=3)
    assert np.array_equal(color.array, np.repeat(np.array(expected)[..., None], 3, axis=3))


def test_what_is_packed_is_kept_until_it_would_differ(folder, tmp_path):
    path = tmp_path / "pack.npy"
    images = open_images(folder, PREPROCESSING)
    pack_images(images, path, recipe="plan 1")
    written = path.stat().st_mtime_ns
    pack_images(images, path, recipe="plan 1")
    assert path.stat().st_mtime_ns == written
    pack_images(images, path, recipe="plan 2")
    assert path.stat().st_mtime_ns > written
    assert len(pack_images(images.select(["000", "003"]), path, recipe="plan 2")) == 2
    path.with_suffix(".json").unlink()  # killed between array and keys
    assert len(pack_images(images, path, recipe="plan 2")) == 5


def test_an_image_that_cannot_be_read_has_no_stand_in(folder, tmp_path):
    (folder / "002.png").write_bytes(b"no image")
    images = open_images(folder, PREPROCESSING, max_unreadable=0.5)
    packed = pack_images(images, tmp_path / "pack.npy")
    assert packed.keys == ("000", "001", "003", "004")
    assert packed.array.shape == (4, 16, 16)
    assert np.array_equal(packed.array[2], dict(images.read_many([3]))["003"])


def test_colour_becomes_gray(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, :, 1] = 255
    Image.fromarray(pixels).save(folder / "a.png")
    packed = pack_images(open_images(folder, PREPROCESSING), tmp_path / "pack.npy")
    assert packed.array.shape == (1, 16, 16)
    assert set(np.unique(packed.array)) == {0, 150}
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        pack_images(open_images(folder, PREPROCESSING), tmp_path / "pack.npy", channels=2)


def test_an_array_that_does_not_fit_its_keys_is_refused(folder, tmp_path):
    packed = pack_images(open_images(folder, PREPROCESSING), tmp_path / "pack.npy")
    np.save(packed.path, packed.array[:3])
    with pytest.raises(ValueError, match="3 images for 5 keys"):
        PackedImages(packed.path)
