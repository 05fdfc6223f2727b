"""What a source is: never guessed at, never another kind of store because of one file."""

import json
import logging
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dicom_files import dicom_report
from diffusers_dino.data import GlobalBatchSampler, Preprocessing, TrainingViews, load_batches, open_images, read_image
from diffusers_dino.data.stores.archives import INDEX_SUFFIX, write_index
from shard_files import encode, write_manifest, write_shards, write_tar

PREPARE = Preprocessing(8)


def fill(folder: Path, count: int = 3, suffix: str = ".png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}{suffix}").write_bytes(encode(number))
    return folder


def write_parquet(path: Path, rows: list[dict]) -> Path:
    datasets = pytest.importorskip("datasets")
    path.parent.mkdir(parents=True, exist_ok=True)
    data = datasets.Dataset.from_dict({"image": rows})
    features = datasets.Features({"image": datasets.Image()})
    data.cast(features).to_parquet(str(path)) if all(row["bytes"] for row in rows) else _write_plain(path, rows)
    return path


def _write_plain(path: Path, rows: list[dict]) -> None:
    """As anybody can write it: a column of images whose bytes are missing."""
    import pyarrow
    import pyarrow.parquet

    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(rows, kind)})
    info = {"info": {"features": {"image": {"_type": "Image"}}}}
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)


def embedded(count: int) -> list[dict]:
    return [{"bytes": encode(number), "path": None} for number in range(count)]


def add_tar(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_tar(folder / name, {"k.png": encode(9)})


def add_parquet(folder: Path, name: str) -> None:
    write_parquet(folder / name, embedded(2))


def add_info(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")


@pytest.mark.parametrize(
    ("add", "name", "named"),
    [
        *((add_tar, name, "1 tar files") for name in ("old.tar", "sub/old.tar", "OLD.TAR")),
        *((add_parquet, name, "1 Parquet files") for name in ("labels.parquet", "a/b/c/labels.parquet")),
        *((add_info, name, "a saved data set") for name in ("dataset_info.json", "dataset_dict.json")),
    ],
)
def test_a_folder_of_several_kinds_is_not_guessed_at(tmp_path, add, name, named):
    fill(tmp_path / "train", 8)
    (tmp_path / "test").mkdir()
    fill(tmp_path / "test", 2)
    add(tmp_path, name)
    with pytest.raises(ValueError, match=f"holds 10 images and {named}: which are meant"):
        open_images(tmp_path, PREPARE)
    assert len(open_images(tmp_path / "train", PREPARE)) == 8
    assert len(open_images(tmp_path / "**" / "*.png", PREPARE)) == 10


def test_tars_beside_parquet_files_are_not_guessed_at(tmp_path):
    add_tar(tmp_path, "x.tar")
    add_parquet(tmp_path, "data/x.parquet")
    with pytest.raises(ValueError, match="1 tar files and 1 Parquet files"):
        open_images(tmp_path, PREPARE)
    assert open_images(tmp_path / "*.tar", PREPARE).keys == ["k"]
    assert len(open_images(tmp_path / "data" / "*.parquet", PREPARE)) == 2
    assert len(open_images(tmp_path / "data" / "x.parquet", PREPARE)) == 2


def test_a_manifest_says_that_a_folder_holds_shards(tmp_path, caplog):
    paths = write_shards(tmp_path, 1)
    write_index(paths[0])
    assert len(open_images(tmp_path, PREPARE)) == 8
    (tmp_path / "example.png").write_bytes(encode(1))
    with pytest.raises(ValueError, match="1 images and 1 tar files"):
        open_images(tmp_path, PREPARE)
    write_manifest(tmp_path)
    assert len(open_images(tmp_path, PREPARE)) == 8
    assert "1 images beside them are not read" in caplog.text


@pytest.mark.parametrize("kind", ["dead link", "pipe"])
def test_a_shard_that_is_no_file_is_counted(tmp_path, caplog, kind):
    path = write_shards(tmp_path, 2)[1]
    path.unlink()
    path.symlink_to("nowhere") if kind == "dead link" else os.mkfifo(path)
    assert len(open_images(tmp_path, PREPARE)) == 8
    assert "links that lead nowhere, pipes and devices: 1, such as x-000001.tar" in caplog.text


@pytest.mark.parametrize("content", ['{"name": "a web page"}', "[]", "{", "[" * 100_000])
def test_a_manifest_of_something_else_does_not_hide_images(tmp_path, content):
    fill(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    assert len(open_images(tmp_path, PREPARE)) == 3


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("*.png", 3),
        ("**/*.png", 5),
        ("**/*", 7),
        ("sub/*.png", 2),
        ("*/?.png", 2),
        ("{sub,other}/*.{png,tif}", 4),
        ("[01].png", 2),
        ("[!01].png", 1),
        ("*.seg.png", 1),
    ],
)
def test_a_pattern_says_which_images_are_meant(tmp_path, pattern, count):
    fill(tmp_path)
    fill(tmp_path / "sub", 2)
    fill(tmp_path / "other", 2, ".tif")
    fill(tmp_path / "@eaDir")
    (tmp_path / "0.seg.png").write_bytes(encode(1))
    add_tar(tmp_path, "old.tar")
    assert len(open_images(tmp_path / pattern, PREPARE)) == count


@pytest.mark.parametrize("name", ["set[1]", "[a-z]", "a*b", "wh?t", "b{0..3}", "c{x,y}", "d [1] {2} (3)", "e]f["])
def test_folders_may_have_any_name(tmp_path, name):
    root = tmp_path / name
    fill(root / "images")
    assert len(open_images(root / "images", PREPARE)) == 3
    assert len(open_images(root / "images" / "*.png", PREPARE)) == 3
    write_shards(root / "shards", 2)
    for pattern in ("", "x-*.tar", "x-{000000..000001}.tar", "x-00000[01].tar"):
        assert len(open_images(root / "shards" / pattern, PREPARE)) == 16
    assert len(open_images(root / "shards" / "x-000001.tar", PREPARE)) == 8
    write_manifest(root / "shards")
    for pattern in ("", "x-*.tar", "x-{000000..000001}.tar"):
        assert len(open_images(root / "shards" / pattern, PREPARE)) == 16
    (root / "shards" / "x-000001.tar").rename(root / f"{name}.tar")
    assert len(open_images(root / f"{name}.tar", PREPARE)) == 8
    assert len(open_images(root / "shards" / "*.tar", PREPARE, max_unreadable=0.5)) == 16  # as the manifest says


def test_parquet_in_folders_of_any_name(tmp_path):
    for name in ("set[1]", "wh?t (2)"):
        write_parquet(tmp_path / name / "train.parquet", embedded(2))
        write_parquet(tmp_path / name / "data" / "test-0.parquet", embedded(3))
        assert len(open_images(tmp_path / name, PREPARE)) == 2
        assert len(open_images(tmp_path / name, PREPARE, split="test")) == 3
        assert len(open_images(tmp_path / name / "train.parquet", PREPARE)) == 2


@pytest.mark.parametrize("word", ["seg", "depth", "Mask", "left.lung", "mask1"])
def test_a_picture_beside_an_image_of_its_key_accompanies_it_in_a_tar(tmp_path, caplog, word):
    members = {"a.png": encode(0), f"a.{word}.PNG": encode(1), "a.json": b"{}", "1.2.png": encode(2)}
    members |= {"1.2.8.png": encode(3), f"d/b.{word}.png": encode(4), "d/b.png": encode(5), "z.seg.png": encode(6)}
    path = write_tar(tmp_path / "x.tar", members)
    for _ in range(2):
        images = open_images(path, PREPARE)
        assert images.keys == ["a", "1.2", "1.2.8", "d/b", "z.seg"]
        assert images.companion(0, f"{word.lower()}.png") == encode(1)
        assert images.companion(3, f"{word.lower()}.png") == encode(4)
        assert images.companion(0, "json") == b"{}"
        for place, number in enumerate((0, 2, 3, 5, 6)):
            assert np.array_equal(images.store.read(place), read_image(encode(number)))
        write_index(path)
    asked = open_images(path, PREPARE, image_column=f"{word}.png".lower())
    assert asked.keys == ["a", "d/b"]


@pytest.mark.parametrize("image", ["image", "img"])
@pytest.mark.parametrize("other", ["label", "seg", "mask", "depth"])
def test_of_several_pictures_in_a_sample_the_one_called_image_is_it(tmp_path, image, other):
    members = {f"k.{other}.png": encode(0), f"k.{image}.png": encode(1), "k.json": b"{}"}
    images = open_images(write_tar(tmp_path / "x.tar", members), PREPARE)
    assert images.keys == [f"k.{image}"]
    assert images.companion(0, f"{other}.png") == encode(0)
    assert images.companion(0, "json") == b"{}"


@pytest.mark.parametrize("junk", ["._a.png", "__MACOSX/._a.png", "@eaDir/a.png", "d/.hidden/a.png", ".a.png"])
def test_what_systems_put_into_tars_is_skipped_and_counted(tmp_path, caplog, junk):
    path = write_tar(tmp_path / "x.tar", {"./a.png": encode(0), junk: encode(1), "d/b.png": encode(2)})
    assert open_images(path, PREPARE).keys == ["a", "d/b"]
    assert "hidden files and those of systems: 1" in caplog.text


def test_names_in_tars_that_are_not_utf_8(tmp_path):
    path = write_tar(tmp_path / "x.tar", {os.fsdecode(b"caf\xe9.png"): encode(0), "café.png": encode(1)})
    images = open_images(path, PREPARE)
    assert images.keys == ["caf%E9", "café"]
    assert images[0]["key"] == "caf%E9"
    write_index(path)
    assert open_images(path, PREPARE).keys == images.keys


@pytest.mark.parametrize("place", ["elsewhere", "link", "relative", "pipe", "/dev/zero", "/etc/hostname", "url", "no"])
def test_a_row_does_not_name_files_outside_of_its_data_set(tmp_path, place):
    (tmp_path / "scan.png").write_bytes(encode(5))
    root = tmp_path / "set"
    (root / "pictures").mkdir(parents=True)
    (root / "pictures" / "0.bin").write_bytes(encode(0))  # no image by its name, so that the folder holds one kind
    os.mkfifo(root / "pipe")
    (root / "link").symlink_to(tmp_path / "scan.png")
    named = {"elsewhere": str(tmp_path / "scan.png"), "relative": "../scan.png", "url": "https://localhost/x.png"}
    rows = [{"bytes": None, "path": path} for path in ("pictures/0.bin", named.get(place, place))]
    write_parquet(root / "x.parquet", rows)
    images = open_images(root, PREPARE, max_unreadable=0.5)
    found = list(images.read_many([0, 1], replace=False))
    assert found[0][1] is not None
    assert found[1][1] is None
    assert "not below the folder of the data set" in images.unreadable[1]


def test_a_protocol_counts_no_image_twice(tmp_path, caplog):
    fill(tmp_path)
    (tmp_path / "1.png").write_bytes(b"damaged")
    for in_memory in (False, True):
        images = open_images(tmp_path, PREPARE, max_unreadable=0.4, in_memory=in_memory)
        found = dict(images.read_many(range(3), replace=False))
        assert [image is None for image in found.values()] == [False, True, False]
        assert list(images.unreadable) == [1]
    with pytest.raises(ValueError, match="1 of 3 images cannot be read"):
        list(open_images(tmp_path, PREPARE).read_many([1], replace=False))


def test_reports_do_not_count_as_damaged(tmp_path):
    fill(tmp_path, 4)
    for number in range(4):
        (tmp_path / f"report{number}.dcm").write_bytes(dicom_report())
    for workers in (0, 1):
        images = open_images(tmp_path, PREPARE, max_unreadable=0)
        batches = load_batches(TrainingViews(images, None), GlobalBatchSampler(8, 8), workers)
        assert {key[0] for key in next(batches)["key"]} <= set("0123")
        assert len(images.unreadable) == len(images.not_images) == 4
    only = tmp_path / "only"
    only.mkdir()
    (only / "report.dcm").write_bytes(dicom_report())
    with pytest.raises(ValueError, match="1 of 1 images cannot be read"):
        open_images(only, PREPARE, max_unreadable=1)[0]


def claim(folder: Path, shards: list[dict]) -> None:
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "shards": shards}))


@pytest.mark.parametrize(
    "shards",
    [
        [{"name": "x-000000.tar", "samples": 10_000_000}],
        [{"name": "x-000000.tar", "samples": 2**31 - 1}],
        [{"name": "x-000000.tar", "samples": 8}, {"name": "y.tar", "samples": 10**9}],
        [{"name": f"y-{number:06d}.tar", "samples": 0} for number in range(12_000)],
    ],
)
def test_a_manifest_that_promises_far_more_than_there_is_is_refused(tmp_path, caplog, shards):
    write_shards(tmp_path, 1)
    claim(tmp_path, shards)
    with pytest.raises(ValueError, match="are missing"):
        open_images(tmp_path, PREPARE, max_unreadable=1)
    assert len(caplog.records) < 10


@pytest.mark.parametrize("samples", [True, 1.5, "8", None, -1, 2**31, 2**70])
def test_counts_in_a_manifest_are_checked(tmp_path, samples):
    write_shards(tmp_path, 1)
    claim(tmp_path, [{"name": "x-000000.tar", "samples": samples}])
    with pytest.raises(ValueError, match="is not a manifest"):
        open_images(tmp_path, PREPARE)


@pytest.mark.parametrize("place", ["pipe", "/dev/zero", "folder"])
def test_a_manifest_is_a_regular_file(tmp_path, place):
    write_shards(tmp_path, 1)
    path = tmp_path / "manifest.json"
    if place == "pipe":
        os.mkfifo(path)
    elif place == "folder":
        path.mkdir()
    else:
        path.symlink_to(place)
    with pytest.raises((ValueError, IsADirectoryError), match="manifest"):
        open_images(tmp_path, PREPARE)


UNSOUND = ["{", "[]", "[" * 100_000, '{"shards": [[1]]}', '{"shards": [{"name": "../x.tar", "samples": 1}]}']


@pytest.mark.parametrize("content", UNSOUND, ids=["cut", "list", "deep", "rows", "elsewhere"])
def test_a_damaged_manifest_is_an_error(tmp_path, content):
    write_shards(tmp_path, 1)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="is not a manifest"):
        open_images(tmp_path, PREPARE)


def rewrite(index: Path, change) -> None:
    with np.load(index) as arrays:
        content = change({name: arrays[name] for name in arrays.files})
    with open(index, "wb") as file:
        np.savez(file, **content)


def inflate(index: Path) -> None:
    with zipfile.ZipFile(index, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("header", "keys", "extensions", "first_member", "kinds", "offsets", "sizes"):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (2**17,)})
                file.write(bytes(2**20))


def overstate(index: Path) -> None:
    content = index.read_bytes()
    index.write_bytes(
        content.replace(b"'shape': (9,), ", b"'shape': (1e9,)").replace(
            b"(16,)",
            b"(9**",
        )
    )


@pytest.mark.parametrize(
    "damage",
    [
        inflate,
        overstate,
        lambda index: rewrite(index, lambda arrays: arrays | {"sizes": arrays["sizes"] + 2**40}),
        lambda index: rewrite(index, lambda arrays: arrays | {"offsets": -arrays["offsets"]}),
        lambda index: rewrite(index, lambda arrays: arrays | {"kinds": arrays["kinds"].astype(object)}),
        lambda index: rewrite(index, lambda arrays: arrays | {"header": np.zeros((2, 2))}),
        lambda index: index.write_bytes(bytes(2**20)),
        lambda index: (index.unlink(), os.mkfifo(index)),
        lambda index: (index.unlink(), index.symlink_to("/dev/zero")),
    ],
)
def test_an_index_is_not_believed(tmp_path, caplog, damage):
    path = write_shards(tmp_path, 1)[0]
    index = write_index(path)
    damage(index)
    with caplog.at_level(logging.WARNING):
        assert len(open_images(path, PREPARE)) == 8
    assert f"{path.name}{INDEX_SUFFIX}" in caplog.text or "index beside" in caplog.text


def test_companions_in_another_tar_than_their_image_are_named(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", {"a.png": encode(0), "b.png": encode(1)})
    write_tar(tmp_path / "1.tar", {"a.seg.png": encode(2), "c.png": encode(3)})
    assert len(open_images(tmp_path, PREPARE)) == 4
    assert "1 of 4 samples, such as a.seg," in caplog.text
