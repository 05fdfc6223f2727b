"""Indexes of tars: what is in them, what is refused, and how damage shows."""

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_dino.data.stores.archives import PackedKeys, TarIndex, index_tar, parse_index, write_index
from shard_files import encode, write_tar


def index_of(path) -> TarIndex:
    with open(path, "rb") as file:
        return index_tar(file, str(path), path.stat().st_size)


def contents(path, index: TarIndex) -> dict[str, bytes]:
    data = path.read_bytes()
    return {
        f"{key}.{extension}": data[offset : offset + size]
        for sample, key in enumerate(index.keys)
        for extension, (offset, size) in index.files(sample).items()
    }


@given(st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=1)))
@settings(max_examples=50, deadline=None)
def test_packed_keys_are_a_list(keys):
    packed = PackedKeys(keys)
    assert packed == keys
    assert PackedKeys.from_bytes(packed.to_bytes()) == keys
    with pytest.raises(IndexError):
        packed[len(keys)]


def test_an_index_finds_every_byte_and_is_the_same_after_a_stay_on_disk(tmp_path):
    files = {"1.2.840.png": b"one", "1.2.840.json": b"{}", "sub/b.jpg": b"", "sub/b.mask.png": b"two", "ü" * 120: b"x"}
    path = write_tar(tmp_path / "x.tar", files)
    index = index_of(path)
    assert contents(path, index).items() >= {key: value for key, value in files.items() if "ü" not in key}.items()
    assert index.keys == ["1.2.840", "sub/b", "ü" * 120]
    first = write_index(path).read_bytes()
    assert write_index(path).read_bytes() == first
    assert parse_index(first, path.stat().st_size).to_bytes() == first
    assert not list(tmp_path.glob(".*"))


def test_members_that_lead_elsewhere_are_refused_and_named(tmp_path, caplog):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("/etc/passwd.png", "../up.png", "a/../../b.png", "C:\\x.png", "line\nbreak.png", "./fine.png"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("link.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert index_of(path).keys == ["fine"]
    assert "9 members are links, devices or lead out of it" in caplog.text
    assert "/etc/passwd.png" in caplog.text


def test_an_index_with_unsafe_keys_or_ranges_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.png": b"abc", "b.png": b"abc"})
    index, size = index_of(path), path.stat().st_size
    columns = {name: getattr(index, name) for name in ("first_member", "kinds", "offsets", "sizes")}
    for name in ("../a", "/a", "a/../b", "C:a", ""):
        bad = TarIndex(size, PackedKeys([name, "b"]), index.extensions, **columns)
        with pytest.raises(ValueError, match="contradict"):
            parse_index(bad.to_bytes(), size)
    for column, value in (("offsets", size), ("offsets", -1), ("sizes", 2**62), ("kinds", 7), ("first_member", 2)):
        changed = {name: column.copy() for name, column in columns.items()}
        changed[column][0] = value
        with pytest.raises(ValueError, match="contradict"):
            parse_index(TarIndex(size, index.keys, index.extensions, **changed).to_bytes(), size)


def test_an_index_of_another_tar_with_a_pickle_or_encrypted_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.png": b"abc"})
    content = write_index(path).read_bytes()
    with pytest.raises(ValueError, match="describes a tar of"):
        parse_index(content, path.stat().st_size + 512)
    buffer = io.BytesIO()
    np.savez(buffer, header=np.array([{"an": "object"}], object))
    encrypted = bytearray(content)
    encrypted[content.index(b"PK\x01\x02") + 8] ^= 1
    for damaged in (buffer.getvalue(), bytes(encrypted)):
        with pytest.raises(ValueError, match="damaged"):
            parse_index(damaged, path.stat().st_size)


def test_every_flipped_or_missing_byte_of_an_index_is_refused_or_harmless(tmp_path):
    path = write_tar(tmp_path / "x.tar", {f"k{i}.png": b"abc" * i for i in range(5)})
    content, size = write_index(path).read_bytes(), path.stat().st_size
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[generator.integers(len(content))] ^= 1 << generator.integers(8)
        for candidate in (bytes(damaged), content[: generator.integers(len(content))]):
            try:
                assert parse_index(candidate, size).to_bytes() == content
            except ValueError:
                refused += 1
    assert refused > 200


def test_what_follows_a_damaged_header_is_found(tmp_path):
    path = write_tar(tmp_path / "x.tar", {f"k{i}.png": encode(i) for i in range(6)})
    data = bytearray(path.read_bytes())
    header = index_of(path).files(2)["png"][0] - 512
    data[header + 5] ^= 255
    path.write_bytes(data)
    index = index_of(path)
    assert index.keys == ["k0", "k1", "k3", "k4", "k5"]
    assert f"damaged header at byte {header}" in index.damage
    with pytest.raises(ValueError, match="damaged header"):
        write_index(path)


def test_a_name_that_comes_twice_counts_once_and_is_reported(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.png", b"first"), ("b.png", b"b"), ("a.png", b"second")])
    index = index_of(path)
    assert contents(path, index) == {"a.png": b"first", "b.png": b"b"}
    assert "holds 'a.png' twice" in index.damage


def test_an_empty_tar_is_a_tar_and_other_files_are_not(tmp_path):
    assert len(index_of(write_tar(tmp_path / "empty.tar", {})).keys) == 0
    for content in (b"", b"no tar" * 1000, b"\x1f\x8b" + bytes(3000)):
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(ValueError, match="not a tar"):
            index_of(tmp_path / "x.tar")
