"""Webdataset shards whose bytes follow from their content, and the manifest that says what a folder must hold."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...files import atomic_write, sha256_of, write_json
from ...seeds import derive_seed
from ..images.preprocessing import Preprocessing
from ..splits import SPLITS
from ..stores.archives import INDEX_SUFFIX, index_tar, write_index
from ..stores.shards import MANIFEST

__all__ = [
    "MANIFEST",
    "PlannedShard",
    "Shard",
    "ShardError",
    "plan_shards",
    "read_manifest",
    "verify_shards",
    "write_manifest",
    "write_shard",
]

_FORMAT = 1


class ShardError(ValueError):
    """A folder of shards is not what it should be. The message names the file and says what to do."""


@dataclass(frozen=True)
class Shard:
    """A finished shard, as the manifest describes it."""

    name: str
    samples: int
    bytes: int
    sha256: str
    split: str


@dataclass(frozen=True)
class PlannedShard:
    """Which samples go into a shard, in which order: numbers of images in the order in which the sources list them."""

    name: str
    split: str
    samples: list[int]


def plan_shards(keys: Sequence[str], splits: Sequence[str | None], shard_size: int, seed: int) -> list[PlannedShard]:
    """Share samples out to shards.

    Samples are shuffled, so that each shard holds all sources: training that shuffles within a few shards then sees a
    mixture. Shards of a split differ by one sample at most.

    Args:
        keys: The key of each sample.
        splits: The split of each; None leaves the sample out.
        shard_size: Largest number of samples in a shard.
        seed: Seed of the order, which is a function of it and the key.
    """
    order = {key: derive_seed(seed, "shard", key) for key in keys}
    planned = []
    for split in SPLITS:
        members = [number for number, given in enumerate(splits) if given == split]
        members.sort(key=lambda number: (order[keys[number]], keys[number]))
        count = -(-len(members) // shard_size)
        bounds = [len(members) * i // count for i in range(count + 1)] if count else []
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            planned.append(PlannedShard(f"{split}-{i:06d}.tar", split, members[start:end]))
    return planned


def write_shard(path: Path, split: str, samples: Iterable[tuple[str, dict[str, bytes]]]) -> Shard:
    """Write a shard and its index. The bytes follow from the samples alone: no times, no owners.

    Args:
        path: The tar. It appears under this name when it is complete, and its index after it.
        split: What its samples are for.
        samples: Key and `{extension: content}` of each sample.

    Returns:
        The shard's entry in the manifest.

    Raises:
        OSError: If the disk is full, or the folder is not writable.
    """
    count = 0
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, contents in samples:
            count += 1
            for extension, content in contents.items():
                info = tarfile.TarInfo(f"{key}.{extension}")  # mode 644, owner 0, time 0
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    write_index(path)
    return Shard(path.name, count, path.stat().st_size, sha256_of(path), split)


def write_manifest(
    folder: Path, preprocessing: Preprocessing, shards: Sequence[Shard], lineage: dict[str, Any]
) -> None:
    """Write `manifest.json`, which makes a folder of shards complete.

    Args:
        folder: Where the shards are.
        preprocessing: How their images were prepared.
        shards: All of them.
        lineage: Where the images come from, and what was done to them.
    """
    content = {
        "format": _FORMAT,
        "preprocessing": asdict(preprocessing),
        "preprocessing_hash": preprocessing.fingerprint(),
        "shards": [asdict(shard) for shard in shards],
        "lineage": lineage,
    }
    write_json(folder / MANIFEST, content)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Raises:
        FileNotFoundError: If there is none: the folder is incomplete, or no work of `write_manifest`.
        ShardError: If it cannot be read.
    """
    path = Path(folder) / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no {MANIFEST} in {str(folder)!r}: its shards are not complete.") from error
    except ValueError as error:
        raise ShardError(f"{str(path)!r} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT or "shards" not in content:
        raise ShardError(f"{str(path)!r} is no manifest of format {_FORMAT}.")
    return content


def verify_shards(folder: str | Path, num_workers: int = 4) -> list[str]:
    """Compare all shards of a folder, byte for byte, with the manifest.

    Args:
        folder: Where the shards and the manifest are.
        num_workers: How many files to read at once.

    Returns:
        What is wrong, one sentence a file; empty if nothing is.

    Raises:
        FileNotFoundError: If there is no manifest.
        ShardError: If the manifest is damaged.
    """
    folder = Path(folder)
    entries = read_manifest(folder)["shards"]
    with ThreadPoolExecutor(max(1, num_workers)) as pool:  # hashing lets go of the interpreter's lock
        problems = [problem for problem in pool.map(lambda entry: _problem(folder, entry), entries) if problem]
    known = {entry["name"] for entry in entries}
    strangers = sorted(path.name for path in folder.glob("*.tar") if path.name not in known)
    return problems + [f"{name} is not in the manifest" for name in strangers]


def _problem(folder: Path, entry: dict[str, Any]) -> str | None:
    path = folder / entry["name"]
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes, not {entry['bytes']}"
    if sha256_of(path) != entry["sha256"]:
        return f"{path.name} has changed: its SHA-256 is another one"
    index = path.with_name(path.name + INDEX_SUFFIX)
    with open(path, "rb") as tar:
        expected = index_tar(tar, path.name, entry["bytes"])
    if len(expected.keys) != entry["samples"]:
        return f"{path.name} holds {len(expected.keys)} samples, not {entry['samples']}"
    if index.is_file() and index.read_bytes() != expected.to_bytes():
        return f"{index.name} has changed: delete it, or make it anew with write_index"
    return None
