import errno
import logging
import os
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from diffusers_dino.data import Preprocessing, collate, open_images
from diffusers_dino.data.stores.archives import split_name
from diffusers_dino.data.stores.filesystem import expand_braces
from shard_files import encode, write_tar

PREPARE = Preprocessing(16)


def fill(folder: Path, count: int = 6) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number:03d}.png").write_bytes(encode(number))
    return folder


def test_folder_is_read_in_sorted_order(tmp_path):
    fill(tmp_path / "b", 2)
    fill(tmp_path / "a", 1)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    dataset = open_images(tmp_path, PREPARE)
    assert dataset.keys == ["a/000", "b/000", "b/001"]
    sample = dataset[0]
    assert sample["key"] == "a/000"
    assert sample["image"].shape == (1, 16, 16)
    assert 0 <= sample["image"].min() < sample["image"].max() <= 1


def test_equal_stems_keep_their_extension_in_the_key(tmp_path):
    fill(tmp_path, 1)
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "000.jpg")
    assert open_images(tmp_path, PREPARE).keys == ["000.jpg", "000.png"]


def test_colour_stays_colour_and_a_mixed_batch_is_colour(tmp_path):
    fill(tmp_path, 1)
    (tmp_path / "1.png").write_bytes(encode(1, shape=(20, 24, 3)))
    dataset = open_images(tmp_path, PREPARE)
    assert [len(dataset[i]["image"]) for i in range(2)] == [1, 3]
    batch = collate([dataset[0], dataset[1]])
    assert batch["image"].shape == (2, 3, 16, 16)
    assert (batch["image"][0, 0] == batch["image"][0, 2]).all()


def test_in_memory_gives_the_same_samples(tmp_path):
    fill(tmp_path)
    (tmp_path / "002.png").write_bytes(b"damaged")
    lazy = open_images(tmp_path, PREPARE, max_unreadable=0.5)
    eager = open_images(tmp_path, PREPARE, max_unreadable=0.5, in_memory=True)
    for one, other in zip(lazy, eager, strict=True):
        assert one["key"] == other["key"]
        assert (one["image"] == other["image"]).all()


def test_unreadable_images_are_named_counted_and_replaced_the_same_way(tmp_path, caplog):
    fill(tmp_path)
    (tmp_path / "004.png").write_bytes(encode(4)[:60])
    first, second = (open_images(tmp_path, PREPARE, max_unreadable=0.2) for _ in range(2))
    with caplog.at_level(logging.WARNING):
        replaced = first[4]["key"]
    assert "004.png" in caplog.text
    assert replaced in {"000", "001", "002", "003", "005"}
    assert second[4]["key"] == replaced
    assert list(first.unreadable) == [4]
    first[4]
    assert len(first.unreadable) == 1


def test_too_many_unreadable_images_are_an_error(tmp_path):
    fill(tmp_path)
    (tmp_path / "001.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 6 images cannot be read.*001\.png"):
        open_images(tmp_path, PREPARE, max_unreadable=0.1)[1]
    with pytest.raises(ValueError, match="1 of 6 images cannot be read"):
        open_images(tmp_path, PREPARE, max_unreadable=0.1, in_memory=True)


def test_selection_by_key(tmp_path):
    fill(tmp_path)
    for in_memory in (False, True):
        dataset = open_images(tmp_path, PREPARE, in_memory=in_memory)
        chosen = dataset.select(["004", "001"])
        assert chosen.keys == ["001", "004"]
        assert (chosen[1]["image"] == dataset[4]["image"]).all()
        with pytest.raises(KeyError, match="nowhere"):
            dataset.select(["001", "nowhere"])


def test_shards_of_dotted_keys_with_companions(tmp_path):
    keys = ["1.2.840.113619.1", "1.2.840.113619.2", "sub/plain"]
    files = {}
    for number, key in enumerate(keys):
        files |= {f"{key}.png": encode(number), f"{key}.mask.png": encode(100 + number), f"{key}.json": b"%d" % number}
    dataset = open_images(write_tar(tmp_path / "x.tar", files), PREPARE)
    assert dataset.keys == keys
    assert dataset.companion(1, "json") == b"1"
    assert dataset.companion(2, "mask.png") == encode(102)
    reference = open_images(fill(tmp_path / "folder", 3), PREPARE)
    assert all((one["image"] == other["image"]).all() for one, other in zip(dataset, reference, strict=True))


def test_key_ends_at_the_last_dot():
    assert split_name("1.2.840.png") == ("1.2.840", "png")
    assert split_name("dir.with.dots/1.2.mask.PNG") == ("dir.with.dots/1.2", "mask.png")
    assert split_name("dir.with.dots/file") == ("dir.with.dots/file", "")
    assert split_name(".hidden") == (".hidden", "")


def test_braces_expand_as_in_a_shell(tmp_path):
    assert list(expand_braces("a-{08..10}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert list(expand_braces("{b,c}/{1..2}")) == ["b/1", "b/2", "c/1", "c/2"]
    write_tar(tmp_path / "x-000000.tar", {"a.png": encode(0)})
    with pytest.raises(FileNotFoundError, match=r"x-000001\.tar"):
        open_images(tmp_path / "x-{000000..000001}.tar", PREPARE)


def test_datasets_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"scan": [{"bytes": encode(i), "path": None} for i in range(3)]})
    data = data.cast_column("scan", datasets.Image())
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"val": data}).save_to_disk(str(tmp_path / "splits"))
    dataset = open_images(tmp_path / "one", PREPARE, image_column="scan")
    reference = open_images(fill(tmp_path / "folder", 3), PREPARE)
    assert all((dataset[i]["image"] == reference[i]["image"]).all() for i in range(3))
    assert len(open_images(tmp_path / "splits", PREPARE, image_column="scan", split="val")) == 3
    with pytest.raises(ValueError, match="no column 'image', but scan"):
        open_images(tmp_path / "one", PREPARE)
    with pytest.raises(ValueError, match="no split 'train', but val"):
        open_images(tmp_path / "splits", PREPARE, image_column="scan")


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("number", [0, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_folder_of_parquet_files(tmp_path, monkeypatch, number):
    """Also on a file system without locks."""
    datasets = pytest.importorskip("datasets")
    fcntl = pytest.importorskip("fcntl")
    if number:
        monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(number, os.strerror(number))))
    data = datasets.Dataset.from_dict({"image": [{"bytes": encode(i), "path": None} for i in range(3)]})
    (tmp_path / "data").mkdir()
    data.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "data" / "train-0.parquet"))
    assert len(open_images(tmp_path / "data", PREPARE)) == 3


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("empty", FileNotFoundError, "No image"),
        ("missing/deep/folder", FileNotFoundError, "no folder"),
        ("x-*.tar", FileNotFoundError, "No shard"),
        ("pipe:cat x.tar", ValueError, "run a command"),
        *(
            (f"{scheme}://host/x.tar", ValueError, "cannot be read")
            for scheme in ("ftp", "file", "ssh", "reference", "simplecache::http")
        ),
        *((pattern, FileNotFoundError, "no folder") for pattern in ("nowhere/*.png", "no/where/*.png")),
        ("*.jpg", FileNotFoundError, "No image"),
        ("broken.tar", ValueError, "not a tar"),
        ("single.png", ValueError, "is a file"),
    ],
)
def test_sources_that_cannot_be_opened(tmp_path, source, error, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 1000)
    (tmp_path / "single.png").write_bytes(encode(0))
    with pytest.raises(error, match=message):
        open_images(source if ":" in source else tmp_path / source, PREPARE)


def test_max_unreadable_is_a_fraction(tmp_path):
    with pytest.raises(ValueError, match="fraction"):
        open_images(fill(tmp_path), PREPARE, max_unreadable=5)
