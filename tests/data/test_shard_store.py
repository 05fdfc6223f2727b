"""Shards as a store: lost samples keep their places, damage is named, nothing is ever unpickled."""

import io
import json
import logging
import pickle
import time
from dataclasses import asdict
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_dino.data import (
    GlobalBatchSampler,
    Preprocessing,
    Slot,
    TrainingViews,
    collate,
    load_batches,
    open_images,
)
from diffusers_dino.data.stores.archives import write_index
from diffusers_dino.data.stores.shards import ShardStore
from shard_files import encode, write_manifest, write_shards, write_tar

PREPARE = Preprocessing(16)


def order_of(dataset) -> list[int]:
    sampler = iter(GlobalBatchSampler(len(dataset), len(dataset), order=dataset.order(2)))
    return [slot.index for slot in next(sampler)]


def test_stored_indexes_give_what_headers_give(tmp_path):
    paths = write_shards(tmp_path)
    by_headers = open_images(tmp_path, PREPARE)
    for path in paths[1:]:
        write_index(path)
    by_indexes = open_images(tmp_path, PREPARE)
    assert by_headers.keys == by_indexes.keys
    assert all(torch.equal(one["image"], other["image"]) for one, other in zip(by_headers, by_indexes, strict=True))


@pytest.mark.parametrize("damage", ["missing", "short", "no tar", "one header"])
def test_with_a_manifest_damage_changes_neither_length_nor_order(tmp_path, caplog, damage):
    paths = write_shards(tmp_path)
    write_manifest(tmp_path)
    whole = open_images(tmp_path, PREPARE)
    content = bytearray(paths[1].read_bytes())
    if damage == "missing":
        paths[1].unlink()
    elif damage == "short":
        paths[1].write_bytes(content[: len(content) // 2])
    elif damage == "no tar":
        paths[1].write_bytes(b"no tar" * 5000)
    else:
        content[whole.store._places([12])[0].offset - 512] ^= 1
        paths[1].write_bytes(content)
    with caplog.at_level(logging.WARNING):
        damaged = open_images(tmp_path, PREPARE, max_unreadable=0.5)
    assert "x-000001.tar" in caplog.text
    lost = {"missing": 8, "no tar": 8, "one header": 1}.get(damage, len(damaged.unreadable))
    assert 0 < len(damaged.unreadable) == lost < 9
    assert f"{lost} of 8 samples are lost" in caplog.text
    assert len(damaged) == len(whole)
    assert order_of(damaged) == order_of(whole)
    assert damaged.keys[:8] + damaged.keys[16:] == whole.keys[:8] + whole.keys[16:]
    place = next(iter(damaged.unreadable))
    assert damaged[place]["key"] in whole.keys
    with pytest.raises(ValueError, match=rf"{lost} of 24 images cannot be read.*x-000001\.tar"):
        open_images(tmp_path, PREPARE, max_unreadable=0.01)


def test_a_folder_gives_the_shards_of_a_split_and_a_glob_all_of_them(tmp_path):
    write_shards(tmp_path)
    write_manifest(tmp_path, **{"2": "test"})
    assert len(open_images(tmp_path, PREPARE)) == 16
    assert open_images(tmp_path, PREPARE, split="test").keys[0] == "set-020000"
    assert len(open_images(tmp_path / "*.tar", PREPARE)) == 24
    with pytest.raises(ValueError, match="no split 'val', but test, train"):
        open_images(tmp_path, PREPARE, split="val")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_pickles_are_never_loaded(tmp_path):
    bomb = pickle.dumps(Bomb())
    files = {"a.png": encode(0), "a.pkl": bomb, "a.pyd": bomb, "a.pth": bomb, "b.pkl": bomb, "c.png": bomb}
    files |= {"d.npy": b"\x93NUMPY" + bomb, "e.png": encode(1)}
    dataset = open_images(write_tar(tmp_path / "x.tar", files), PREPARE, max_unreadable=0.9)
    assert {sample["key"] for sample in dataset} == {"a", "e"}
    assert "b" not in dataset.keys
    assert dataset.companion(0, "pkl") == bomb


def test_a_store_travels_to_a_spawned_worker(tmp_path):
    store = ShardStore(write_shards(tmp_path)[0])
    store.read(0)
    assert (pickle.loads(pickle.dumps(store)).read(1) == store.read(1)).all()


@pytest.mark.parametrize("workers", [0, 3])
def test_unreadable_images_of_all_workers_are_counted_together(tmp_path, workers):
    files = {f"k{i:02d}.png": b"damaged" if i % 10 == 0 else encode(i) for i in range(40)}
    dataset = open_images(write_tar(tmp_path / "x.tar", files), PREPARE, max_unreadable=0.08)
    batches = load_batches(TrainingViews(dataset, None), GlobalBatchSampler(40, 4), workers)
    with pytest.raises(ValueError, match=r"4 of 40 images cannot be read"):
        list(islice(batches, 10))
    assert sorted(dataset.unreadable) == [0, 10, 20, 30]


def test_a_shard_of_another_size_than_its_manifest_says_is_named(tmp_path, caplog):
    paths = write_shards(tmp_path, shards=2)
    write_manifest(tmp_path)
    size = paths[1].stat().st_size
    assert len(open_images(tmp_path, PREPARE)) == 16
    assert not caplog.records
    paths[1].write_bytes(paths[1].read_bytes() + bytes(512))
    assert len(open_images(tmp_path, PREPARE)) == 16
    assert f"{paths[1].name} has {size + 512} bytes, not {size} as its manifest says: 0 of 8 samples" in caplog.text
    assert paths[0].name not in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_prepared_images_are_taken_as_they_are(tmp_path, workers):
    """Also where colour, another size and a damaged file lie among them."""
    files = {f"k{i}.jpg": encode(i, "jpeg", (16, 16)) for i in range(9)}
    files["k2.jpg"] = files["k2.jpg"][:-200]
    files["k5.jpg"] = encode(5, "jpeg", (16, 16, 3))
    files["k7.jpg"] = encode(7, "jpeg", (20, 20))
    write_tar(tmp_path / "x.tar", files)
    manifest = {"preprocessing": asdict(PREPARE), "shards": [{"name": "x.tar", "samples": 9}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    dataset = open_images(tmp_path, PREPARE, max_unreadable=0.2)
    slots = [[Slot(i, 0, i % 9) for i in range(first, first + 3)] for first in range(0, 27, 3)]
    for batch, places in zip(load_batches(TrainingViews(dataset, None), slots, workers), slots, strict=True):
        expected = collate([dataset[slot.index] for slot in places])
        assert batch["key"] == expected["key"]
        assert torch.equal(batch["image"], expected["image"])
        assert batch["image"].shape[1] == (3 if 5 in [slot.index for slot in places] else 1)
    raw = np.asarray(Image.open(io.BytesIO(files["k0.jpg"])))
    assert np.array_equal(dataset[0]["image"][0].mul(255).round().byte().numpy(), raw)


def corrupt(content: bytes, generator: np.random.Generator) -> bytes:
    """A tar with one or several kinds of damage."""
    data = bytearray(content)
    headers = [place for place in range(0, len(data), 512) if data[place + 257 : place + 262] == b"ustar"]
    kind = generator.integers(7)
    if kind == 0:
        return bytes(data[: generator.integers(len(data))])
    if kind == 1:  # bits of payloads and headers alike
        for place in generator.integers(0, len(data), generator.integers(1, 50)):
            data[place] ^= 1 << generator.integers(8)
    elif kind == 2:  # bits of a header
        data[generator.choice(headers) + generator.integers(512)] ^= 1 << generator.integers(8)
    elif kind == 3:  # a size beyond all bounds, negative or not, with a checksum that is right
        header = int(generator.choice(headers))
        sizes = (b"77777777777\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"-0000000001\0", b"\x80\0\0\0" + b"\x7f" * 8)
        data[header + 124 : header + 136] = sizes[generator.integers(len(sizes))]
        data[header + 156] = generator.choice(list(b"0xgLKS5"))
        data[header + 148 : header + 156] = b" " * 8
        data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    elif kind == 4:  # a block that is zero, or noise
        place = 512 * int(generator.integers(len(data) // 512))
        data[place : place + 512] = bytes(512) if generator.integers(2) else generator.bytes(512)
    elif kind == 5:  # bytes missing in the middle
        place = int(generator.integers(len(data)))
        del data[place : place + int(generator.integers(1, 2000))]
    else:  # the archive twice, so that every name is there twice
        return content + content
    return bytes(data)


def test_corrupted_shards_are_read_or_named(tmp_path, caplog):
    whole = write_shards(tmp_path, shards=1)[0]
    content = whole.read_bytes()
    reference = {sample["key"]: sample["image"] for sample in open_images(whole, PREPARE)}
    generator = np.random.default_rng(0)
    outcomes = {"opened": 0, "refused": 0, "samples": 0, "unreadable": 0}
    start = time.monotonic()
    for number in range(120):
        path = tmp_path / f"damaged-{number:03d}.tar"
        path.write_bytes(corrupt(content, generator))
        caplog.clear()
        try:
            dataset = open_images(path, PREPARE, max_unreadable=1)
            samples = list(dataset)
        except (ValueError, FileNotFoundError) as error:
            assert path.name in str(error)  # noqa: PT017
            outcomes["refused"] += 1
            continue
        outcomes["opened"] += 1
        outcomes["samples"] += len(samples)
        outcomes["unreadable"] += len(dataset.unreadable)
        assert all(path.name in reason for reason in dataset.unreadable.values())
        gone = set(reference) - set(dataset.keys)
        assert not gone or path.name in caplog.text  # what is lost with its header is named with its shard
        assert all(sample["image"].shape == (1, 16, 16) for sample in samples)
    assert time.monotonic() - start < 120
    assert outcomes["opened"] > 80
    assert outcomes["refused"] > 2
    assert outcomes["unreadable"] > 8
