"""Features with their keys: extracted as a stream, kept in a file, compared only with their like."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

import scripts
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.metrics import FeatureSet, extract_features, open_extractor
from diffusers_dino.metrics.features import iterate_features
from tiny import random_images


@pytest.fixture
def folder(tmp_path):
    """Twelve noisy gray images of 20 px."""
    noise = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(noise.integers(0, 256, (20, 20), np.uint8)).save(tmp_path / f"{number:02}.png")
    return tmp_path


def open_folder(folder, **options):
    return open_images(folder, Preprocessing(20, remove_borders=False), **options)


@pytest.fixture
def features():
    return extract_features(open_extractor("pixels"), random_images(4), keys=["a", "b", "c", "ü\nd"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_set_gives_the_features_of_its_images_in_order(folder, num_workers):
    images = open_folder(folder)
    extracted = extract_features(open_extractor("pixels"), images, batch_size=5, num_workers=num_workers)
    whole = torch.stack([images[i]["image"] for i in range(len(images))])
    assert extracted.keys == tuple(images.keys)
    torch.testing.assert_close(extracted.features, open_extractor("pixels")(whole))
    assert [len(features) for features, _ in iterate_features(open_extractor("pixels"), images, 5)] == [5, 5, 2]


def test_images_that_cannot_be_read_are_left_out_and_not_replaced(folder, caplog):
    (folder / "03.png").write_bytes(b"no image")
    with caplog.at_level(logging.WARNING):
        extracted = extract_features(open_extractor("pixels"), open_folder(folder, max_unreadable=0.2), batch_size=5)
    assert len(extracted) == len(set(extracted.keys)) == 11
    assert not any(key.startswith("03") for key in extracted.keys)
    assert "1 images cannot be read and have no features" in caplog.text


def test_a_file_gives_back_what_was_saved(features, tmp_path):
    features.save(tmp_path / "features.safetensors")
    loaded = FeatureSet.load(tmp_path / "features.safetensors")
    assert torch.equal(loaded.features, features.features)
    assert (loaded.keys, loaded.spec) == (features.keys, features.spec)
    first = (tmp_path / "features.safetensors").read_bytes()
    features.save(tmp_path / "features.safetensors")
    assert (tmp_path / "features.safetensors").read_bytes() == first


def test_features_that_do_not_fit_their_keys_are_refused(features):
    for message, values, keys in (
        ("3 keys", features.features, ("a", "b", "c")),
        ("NaN", features.features * float("nan"), features.keys),
        ("floating", features.features.long(), features.keys),
    ):
        with pytest.raises(ValueError, match=message):
            FeatureSet(values, keys, features.spec)


def test_features_are_numbered_and_chosen_by_key(features):
    images = random_images(3)
    assert extract_features(open_extractor("pixels"), images, batch_size=2).keys == ("0", "1", "2")
    with pytest.raises(ValueError, match="2 keys for 3 images"):
        extract_features(open_extractor("pixels"), images, keys=["a", "b"])
    chosen = features.select(["c", "a"])
    assert chosen.keys == ("c", "a")
    assert torch.equal(chosen.features, features.features[[2, 0]])
    with pytest.raises(KeyError, match="such as z"):
        features.select(["z"])


def test_the_command_writes_the_features_of_the_chosen_images(folder, tmp_path):
    keys = open_folder(folder).keys[2:7]
    (tmp_path / "keys.txt").write_text("\n".join(keys))
    output = tmp_path / "features.safetensors"
    flags = {"extractor": "pixels", "resolution": 20, "remove_borders": False, "batch_size": 2}
    scripts.call_script("extract", data=folder, output=output, keys_file=tmp_path / "keys.txt", **flags)
    written = FeatureSet.load(output)
    assert written.keys == tuple(keys)
    expected = extract_features(open_extractor("pixels"), open_folder(folder)).select(keys)
    torch.testing.assert_close(written.features, expected.features)
