"""What is found in a folder: one walk for training, evaluation and sharding."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from dicom_files import dicom_bytes
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.data.images.reading import is_image_file
from diffusers_dino.data.stores.folder import FolderStore
from diffusers_dino.data.stores.walk import RECORDS, WORK, list_files
from shard_files import encode

DICOM = dicom_bytes(np.arange(64, dtype=np.uint16).reshape(8, 8), 12)


def fill(root: Path, *names: str, content: bytes | None = None) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(number) if content is None else content)
    return root


@pytest.mark.parametrize(
    "junk",
    [
        *("._a.png", "b/._a.png", ".Trash-1000/files/a.png", ".ipynb_checkpoints/a-checkpoint.png", "@eaDir/a.png"),
        *("b/@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/b/._a.png", "#recycle/a.png", "$RECYCLE.BIN/S-1/a.png"),
        *(".AppleDouble/a.png", "System Volume Information/a.png", ".snapshot/daily/a.png", "lost+found/a.png"),
    ],
)
def test_what_systems_leave_behind_is_skipped_and_counted(tmp_path, caplog, junk):
    store = FolderStore(fill(tmp_path, "a.png", "b/a.png", junk))
    assert store.keys == ["a", "b/a"]
    assert sum(map(len, store.left_out.values())) == 1
    assert "left out" in caplog.text


@pytest.mark.parametrize("own", [RECORDS, WORK])
def test_what_a_synthetic_set_keeps_beside_its_tars_is_not_told_of(tmp_path, own):
    (tmp_path / own).mkdir()
    (tmp_path / own / "a.png").touch()
    assert (list_files(tmp_path).files, list_files(tmp_path).left_out) == ([], {})


def test_a_folder_below_a_hidden_one_is_read(tmp_path):
    assert FolderStore(fill(tmp_path / ".cache" / "set", "a.png")).keys == ["a"]


def test_links_to_folders_are_followed_once(tmp_path):
    elsewhere = fill(tmp_path / "elsewhere", "c.png", "deep/d.png")
    root = fill(tmp_path / "root", "a.png", "sub/b.png")
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere / "deep")  # a part of what `linked` leads to
    (root / "sub" / "loop").symlink_to(root)
    (root / "sub" / "up").symlink_to(tmp_path)
    (root / "same").symlink_to("sub")
    (root / "itself").symlink_to("itself")
    (root / "dead.png").symlink_to("nowhere.png")
    (root / "linked.png").symlink_to(elsewhere / "c.png")
    os.mkfifo(root / "pipe.png")
    store = FolderStore(root)
    files = [os.path.realpath(root / path) for path in store.paths if not (root / path).is_symlink()]
    assert len(files) == len(set(files)) == 4
    assert "sub/b" in store.keys
    assert "linked" in store.keys  # a link to a file is a file
    assert sum(map(len, store.left_out.values())) == 4 + 3


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_what_cannot_be_opened_is_named_and_counted(tmp_path, caplog, monkeypatch, error):
    fill(tmp_path, "a.png", "closed/b.png")
    fill(tmp_path, "IM01", content=DICOM)
    scan, opened = os.scandir, open

    def refuse(path):
        if str(path).endswith("closed"):
            raise error
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert FolderStore(tmp_path).keys == ["IM01", "a"]
    assert f"folders that cannot be opened ({error.strerror}): 1, such as closed" in caplog.text
    caplog.clear()
    FolderStore(tmp_path, show_names=False)
    assert "closed" not in caplog.text.replace("folders that", "")

    def refuse_file(path, *arguments, **options):
        if str(path).endswith("IM01"):
            raise error
        return opened(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse_file)
    assert FolderStore(tmp_path).keys == ["a"]
    assert f"files that cannot be opened ({error.strerror}): 1, such as IM01" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        *(
            (name, DICOM, True)
            for name in ("IM0001", "1.2.840.5", "a.IMA", "a.ima", "a.dc3", "a.MR", "a.0001", "a.img")
        ),
        *((name, DICOM, False) for name in ("DICOMDIR", "a.json", "a.zip")),
        *(
            (name, b"some text, long enough to be looked at" * 9, False)
            for name in ("README", "a.IMA", "1.2.3", "x.bin")
        ),
        *((name, DICOM[132:], True) for name in ("IM0001", "a.IMA", "1.2.840.5")),  # begins with its own group
        ("IM0001", DICOM[132:][DICOM[132:].index(b"\x08\0\x16\0") :], True),  # begins with the data set
        ("IM0001", b"", False),
        ("IM0001", bytes(4096), False),
        ("a.png", b"", True),
        ("a.npz", b"", True),
    ],
)
def test_dicom_is_found_by_content_whatever_it_is_called(tmp_path, name, content, found):
    path = fill(tmp_path, name, content=content) / name
    assert is_image_file(path) is found
    fill(tmp_path, "other.png")
    assert (name in FolderStore(tmp_path).paths) is found
    if found and content:
        images = open_images(tmp_path, Preprocessing(8))
        (index,) = [n for n, path in enumerate(images.store.paths) if path == name]
        assert images.store.read(index).max() == 63


@pytest.mark.parametrize("word", ["seg", "depth", "Mask", "mask1", "lung.left", "label", "heatmap"])
def test_a_picture_beside_an_image_of_its_name_accompanies_it(tmp_path, caplog, word):
    names = [f"{word}.PNG", f"{word}.png".lower(), f"{word}.tif"]
    for number, name in enumerate(names):
        fill(tmp_path / str(number), "a.png", "b.png", "1.2.840.png", "1.2.840.7.png", f"a.{name}")
        store = FolderStore(tmp_path / str(number))
        assert store.keys == ["1.2.840.7", "1.2.840", "a", "b"]
        assert store.companion(2, name.lower()) == encode(4)
        with pytest.raises(KeyError, match="no companion"):
            store.companion(3, name.lower())
    assert FolderStore(fill(tmp_path / "alone", "a.seg.png")).keys == ["a.seg"]
    store = FolderStore(fill(tmp_path / "named", "a.image.png", f"a.{word}.png"))
    assert store.keys == ["a.image"]
    assert store.companion(0, f"{word.lower()}.png") == encode(1)


def test_line_breaks_in_names(tmp_path):
    assert FolderStore(fill(tmp_path, "a\nb.png")).keys == ["a%0Ab"]


def test_names_that_are_not_utf_8(tmp_path, caplog):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        fill(tmp_path, name, "café.png", "a/b.png")
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    with caplog.at_level(logging.WARNING):
        images = open_images(tmp_path, Preprocessing(8), max_unreadable=0.5)
    assert images.keys == ["a/b", "café", "caf%E9"] or images.keys == ["a/b", "caf%E9", "café"]
    place = images.keys.index("caf%E9")
    assert images[place]["key"].encode()
    (tmp_path / name).write_bytes(b"damaged")
    assert images[place]["key"] != "caf%E9"
    assert "caf%E9.png" in caplog.text.encode().decode()


def test_the_walk_raises_only_for_the_folder_itself(tmp_path):
    with pytest.raises(FileNotFoundError):
        list_files(tmp_path / "nowhere")
    assert list_files(tmp_path).files == []
