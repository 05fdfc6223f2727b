import json
import pickle
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import scripts
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.evaluation.generation import stack_readable
from diffusers_dino.evaluation.packed import pack_images
from diffusers_dino.pixels import unit_to_uint8, with_channels
from image_files import encoded
from shard_files import write_prepared, write_tar

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


COLOURS = {
    "noise": lambda rng: rng.integers(0, 256, (16, 16, 3), np.uint8),
    "whole range": lambda rng: np.concatenate([np.full((1, 16, 3), v, np.uint8) for v in (0, 255)] * 8),
    "red": lambda rng: rng.integers(0, 256, (16, 16, 3), np.uint8) * np.array([1, 0, 0], np.uint8),
    "dark blue": lambda rng: rng.integers(20, 60, (16, 16, 3), np.uint8) * np.array([0, 0, 3], np.uint8),
    "a film saved as colours": lambda rng: rng.integers(30, 200, (16, 16, 1), np.uint8).repeat(3, 2),
}


@pytest.mark.parametrize("size", [16, 9])
@pytest.mark.parametrize("kind", COLOURS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_colour_image_is_packed_alike_whether_it_is_real_or_synthetic(channels, kind, size, tmp_path):
    pixels = COLOURS[kind](np.random.default_rng(0))
    drawn = torch.from_numpy(pixels).movedim(-1, 0).float() / 255
    stored = (
        unit_to_uint8(with_channels(drawn, channels)).movedim(0, -1).numpy()
    )  # as a synthesis stores what it draws
    packed = {}
    for name, array in (("real", pixels), ("synthetic", stored.squeeze())):
        (tmp_path / name).mkdir()
        Image.fromarray(array).save(tmp_path / name / "a.png")
        images = open_images(tmp_path / name, Preprocessing(size, remove_borders=False))
        packed[name] = pack_images(images, tmp_path / f"{name}.npy", channels=channels)
    assert packed["real"].array.shape == ((1, size, size) if channels == 1 else (1, size, size, 3))
    assert np.array_equal(packed["real"].array, packed["synthetic"].array)
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        pack_images(images, tmp_path / "pack.npy", channels=2)


def test_prepared_images_are_packed_at_another_size_without_a_second_preparation(tmp_path):
    gray = np.random.default_rng(0).integers(0, 256, (40, 80), np.uint8)
    gray[:, 20:28] = 255  # a band at the side of the square that is kept
    colour = np.stack([gray, gray[::-1], np.zeros_like(gray)], axis=2)
    folder = write_prepared(tmp_path / "shards", {"a": gray, "b": colour}, Preprocessing(40))
    images = open_images(folder, Preprocessing(40))
    assert images.select(["b"]).resized(16).keys == ["b"]
    packed = pack_images(images.resized(16), tmp_path / "pack.npy")
    plain = Preprocessing(16, remove_borders=False)
    assert np.array_equal(packed.array[0], plain(gray[:, 20:60]))
    assert np.array_equal(packed.array[1], plain(images.read_raw(1).mean(axis=2).round().astype(np.uint8)))


def test_images_of_one_name_in_two_shards_keep_their_own_pixels(tmp_path):
    for name, level in (("x", 50), ("y", 150)):
        colour = np.full((16, 16, 3), level, np.uint8)
        colour[0, 0] = (0, 255, 255)
        colour[0, 1] = (level, 0, 0)
        write_tar(tmp_path / f"{name}.tar", {"0.png": encoded(colour)})
    images = open_images(tmp_path, Preprocessing(16, remove_borders=False))
    assert stack_readable(images).rows == [0, 1]
    first, second = pack_images(images, tmp_path / "pack.npy").array
    assert first[8, 8] < second[8, 8]


def test_other_images_of_the_same_names_are_not_taken_for_those_that_were_packed(folder, tmp_path):
    pack_images(open_images(folder, PREPROCESSING), tmp_path / "pack.npy")
    shutil.copytree(folder, tmp_path / "copy")
    pack_images(open_images(tmp_path / "copy", PREPROCESSING), tmp_path / "pack.npy")
    Image.fromarray(np.arange(32 * 32, dtype=np.uint8).reshape(32, 32)).save(folder / "003.png")
    with pytest.raises(ValueError, match=r"pack\.npy was packed from other images of these names"):
        pack_images(open_images(folder, PREPROCESSING), tmp_path / "pack.npy")


@pytest.mark.parametrize("kind", ["shards", "parquet"])
def test_shards_and_data_sets_tell_other_images_too(kind, tmp_path):
    for name, seed in (("one", 0), ("other", 1)):
        arrays = np.random.default_rng(seed).integers(0, 256, (2, 32, 32), np.uint8)
        if kind == "shards":
            source = write_prepared(tmp_path / name, dict(zip("ab", arrays, strict=True)), PREPROCESSING)
        else:
            rows = [{"image": {"bytes": encoded(array, "png"), "path": None}} for array in arrays]
            data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
            source = tmp_path / f"{name}.parquet"
            data.to_parquet(source)
        images = open_images(source, PREPROCESSING)
        if name == "one":
            pack_images(images, tmp_path / "pack.npy")
        else:
            with pytest.raises(ValueError, match="other images of these names"):
                pack_images(images, tmp_path / "pack.npy")


def test_packs_of_older_versions_are_kept_unless_they_had_colours(tmp_path):
    folder = scripts.image_folder(tmp_path / "images", 3, size=40)
    gray = pack_images(open_images(folder, PREPROCESSING), tmp_path / "gray.npy")
    for path in folder.iterdir():  # films that were saved as colour images are gray
        Image.open(path).convert("RGB").save(path)
    images = open_images(folder, PREPROCESSING)
    film = pack_images(images, tmp_path / "film.npy")
    assert (film.recipe, film.num_averaged) == (gray.recipe, 0)
    red = np.zeros((40, 40, 3), np.uint8)
    red[:20, :, 0] = 200
    Image.fromarray(red).save(folder / "000.png")
    colour = pack_images(images, tmp_path / "colour.npy")
    assert colour.num_averaged == 1
    assert colour.array[0].max() == 255
    for packed in (film, colour):
        path = packed.path.with_suffix(".json")
        facts = json.loads(path.read_text())
        del facts["sha256"], facts["originals"]
        path.write_text(json.dumps(facts | {"recipe": gray.recipe if packed is film else "of an older version"}))
        written = packed.path.stat().st_mtime_ns
        assert pack_images(images, packed.path).recipe == packed.recipe
        assert (packed.path.stat().st_mtime_ns == written) == (packed is film)


def test_what_older_versions_packed_is_packed_anew_and_keeps_its_recipe_unless_it_had_colours(folder, tmp_path):
    path, images = tmp_path / "pack.npy", open_images(folder, PREPROCESSING)
    recipe = pack_images(images, path).recipe
    facts = json.loads(path.with_suffix(".json").read_text())
    del facts["num_averaged"]
    path.with_suffix(".json").write_text(json.dumps(facts))
    before = path.stat().st_mtime_ns
    packed = pack_images(images, path)
    assert (packed.recipe, packed.num_averaged) == (recipe, 0)  # judges and cells of these pixels stay valid
    assert path.stat().st_mtime_ns > before
    Image.fromarray(np.arange(16 * 16 * 3).reshape(16, 16, 3).astype(np.uint8)).save(folder / "000.png")
    colour = pack_images(images, tmp_path / "colour.npy")
    assert colour.num_averaged == 1
    assert colour.recipe != recipe
