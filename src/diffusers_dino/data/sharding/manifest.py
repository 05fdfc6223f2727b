"""Webdataset shards whose bytes depend only on their content, and the manifest that lists the shards of a folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...files import atomic_write, read_json, sha256_of, write_json
from ..images.preprocessing import Preprocessing
from ..stores.archives import INDEX_SUFFIX, index_tar, write_index
from ..stores.shard_list import MANIFEST

__all__ = [
    "MANIFEST",
    "Shard",
    "ShardError",
    "check_shards",
    "few",
    "read_manifest",
    "shard_problem",
    "verify_shards",
    "write_manifest",
    "write_shard",
]

_FORMAT = 1


class ShardError(ValueError):
    """A folder of shards is damaged, or was begun with other settings. The message says what to do."""


@dataclass(frozen=True)
class Shard:
    """A finished shard, as the manifest describes it."""

    name: str
    samples: int
    bytes: int
    sha256: str
    split: str


def write_shard(path: Path, split: str, samples: Iterable[tuple[str, dict[str, bytes]]]) -> Shard:
    """Write a shard of `(key, {extension: content})`, then its index. The bytes hold no times and no owners."""
    from webdataset import TarWriter  # slow to import, and only writers need it

    plain = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "encoder": False}
    count = 0
    with atomic_write(path) as file, TarWriter(file, **plain) as tar:
        for key, contents in samples:
            count += 1
            for extension, content in contents.items():  # one by one: of several, TarWriter sorts the extensions
                tar.write({"__key__": key, extension: content})
    write_index(path)
    return Shard(path.name, count, path.stat().st_size, sha256_of(path), split)


def write_manifest(
    folder: Path, preprocessing: Preprocessing, shards: Sequence[Shard], lineage: dict[str, Any]
) -> None:
    """Write `manifest.json`, which makes a folder of shards complete; `lineage` says where the images come from."""
    content = {
        "format": _FORMAT,
        "preprocessing": asdict(preprocessing),
        "preprocessing_hash": preprocessing.fingerprint(),
        "shards": [asdict(shard) for shard in shards],
        "lineage": lineage,
    }
    write_json(folder / MANIFEST, content)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a folder of shards; `FileNotFoundError` if there is none yet, `ShardError` if it is damaged."""
    path = Path(folder) / MANIFEST
    try:
        content = read_json(path, error=ShardError)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no {MANIFEST} in {str(folder)!r}: its shards are not complete.") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT or "shards" not in content:
        raise ShardError(f"{str(path)!r} is not a manifest of format {_FORMAT}.")
    shards = content["shards"]
    if not isinstance(shards, list) or not all(map(_is_sound, shards)):
        raise ShardError(f"{str(path)!r} is damaged: the name, a number or the hash of a shard cannot be right.")
    if len({shard["name"] for shard in shards}) < len(shards):
        raise ShardError(f"{str(path)!r} is damaged: it names a shard twice.")
    return content


def _is_sound(entry: Any) -> bool:
    """Whether an entry of a manifest describes a tar beside it that could be: a sample takes 512 bytes or more."""
    if not isinstance(entry, dict):
        return False
    name, split = entry.get("name"), entry.get("split")
    numbers = [entry.get(key) for key in ("samples", "bytes")]
    return (
        isinstance(name, str)
        and name.endswith(".tar")
        and not set(name) & set("/\\\0")
        and all(type(number) is int for number in numbers)
        and 0 <= 512 * numbers[0] <= numbers[1] < 1 << 63
        and isinstance(entry.get("sha256"), str)
        and re.fullmatch("[0-9a-f]{64}", entry["sha256"]) is not None
        and (split is None or isinstance(split, str))
    )


def verify_shards(folder: str | Path, num_workers: int = 4) -> list[str]:
    """Compare all shards of a folder, byte for byte, with the manifest: what is wrong, one sentence for each file.

    `num_workers` files are read at once. See `read_manifest` for errors.
    """
    folder = Path(folder)
    entries = read_manifest(folder)["shards"]
    with ThreadPoolExecutor(max(1, num_workers)) as pool:  # hashing releases the GIL
        problems = [problem for problem in pool.map(lambda entry: shard_problem(folder, entry), entries) if problem]
    known = {entry["name"] for entry in entries}
    strangers = sorted(path.name for path in folder.glob("*.tar") if path.name not in known)
    return problems + [f"{name} is not in the manifest" for name in strangers]


def check_shards(folder: str | Path, num_workers: int = 4) -> dict[str, Any]:
    """The manifest of a folder, if `verify_shards` finds nothing wrong; else raise `ShardError`."""
    if problems := verify_shards(folder, num_workers):
        raise ShardError(
            f"{folder} is damaged: {few(problems)}. Delete {MANIFEST} and make the shards anew, with the same "
            "settings."
        )
    return read_manifest(folder)


def few(problems: Sequence[str]) -> str:
    """The first problems, and how many more there are."""
    more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
    return "; ".join([*problems[:10], *more])


def shard_problem(folder: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a shard that a manifest describes so, or with its index; None if nothing."""
    path = folder / entry["name"]
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes, not {entry['bytes']}"
    if sha256_of(path) != entry["sha256"]:
        return f"{path.name} has changed: its SHA-256 differs"
    index = path.with_name(path.name + INDEX_SUFFIX)
    with open(path, "rb") as tar:
        expected = index_tar(tar, path.name, entry["bytes"])
    if len(expected.keys) != entry["samples"]:
        return f"{path.name} holds {len(expected.keys)} samples, not {entry['samples']}"
    content = expected.to_bytes()
    if index.is_file() and (index.stat().st_size != len(content) or index.read_bytes() != content):
        return f"{index.name} has changed: delete it, or make it anew with write_index"
    return None
