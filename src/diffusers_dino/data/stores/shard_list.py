"""Which shards a pattern or a folder stands for, and what a manifest beside them says of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ...files import read_json
from ..images.preprocessing import Preprocessing
from .filesystem import FileSystem, expand_braces, is_pattern
from .remote import url_path

__all__ = ["MANIFEST", "find_shards", "is_shard_manifest", "prepared_by"]

MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 2**28  # bytes


def find_shards(files: FileSystem, pattern: str, split: str | None) -> tuple[list[str], dict[str, dict]]:
    """The shards that a pattern stands for, sorted, and what a manifest says of them."""
    if not url_path(pattern).endswith(".tar"):
        return _find_in_folder(files, pattern.rstrip("/"), split)
    found: set[str] = set()
    expected: dict[str, dict] = {}
    manifests: dict[str, dict[str, dict]] = {}
    for path in expand_braces(pattern):
        folder, _, name = url_path(path).rpartition("/")
        if folder not in manifests:
            manifests[folder] = {_join(folder, shard["name"]): shard for shard in _read_manifest(files, folder)}
        if path in manifests[folder] or (not is_pattern(name) and _exists(files, path)):
            matched = {path}
        else:
            promised = {
                _join(folder, one["name"]) for one in manifests[folder].values() if fnmatchcase(one["name"], name)
            }
            matched = {*files.glob(path), *promised}
        if not matched:
            hint = "Give tar files, a glob or a brace range such as {000..009}."
            raise FileNotFoundError(f"No shard {files.show(path)!r} (from {files.show(pattern)!r}). {hint}")
        expected |= {shard: manifests[folder][shard] for shard in matched if shard in manifests[folder]}
        found |= matched
    return sorted(found), expected


def _find_in_folder(files: FileSystem, folder: str, split: str | None) -> tuple[list[str], dict[str, dict]]:
    shards = _read_manifest(files, folder)
    if not shards:
        found = files.glob(_join(folder, "*.tar"))
        if not found:
            raise FileNotFoundError(f"No .tar file in {files.show(folder)!r}, and no {MANIFEST} that names some.")
        return found, {}
    splits = sorted({str(shard["split"]) for shard in shards if shard.get("split")})
    if split is not None and splits:
        shards = [shard for shard in shards if shard.get("split") == split]
        if not shards:
            raise ValueError(f"{files.show(folder)!r} has no split {split!r}, but {', '.join(splits)}.")
    expected = {_join(folder, shard["name"]): shard for shard in shards}
    return sorted(expected), expected


def _read_manifest(files: FileSystem, folder: str) -> list[dict]:
    """The shards that the manifest in a folder lists; an empty list without a manifest."""
    path = _join(folder, MANIFEST)
    hint = "Mend it, or rename it to read the shards without one."
    try:
        shards = _parse_json(files.read(path, _LARGEST_MANIFEST))["shards"]
        names = [shard["name"] for shard in shards]
        sound = all(type(shard["samples"]) is int and 0 <= shard["samples"] < 2**31 for shard in shards)
        sound = sound and all(isinstance(name, str) and name.endswith(".tar") and "/" not in name for name in names)
    except (FileNotFoundError, PermissionError):  # a bucket that may not be listed says "forbidden" for "missing"
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{files.show(path)!r} is not a manifest of shards: {error!r}. {hint}") from error
    if not sound or len(set(names)) < len(names):
        raise ValueError(f"{files.show(path)!r} is not a manifest of shards: a name or a count in it is wrong. {hint}")
    return shards


def prepared_by(files: FileSystem, shards: Sequence[str]) -> Preprocessing | None:
    """How the images of shards that are in a manifest were prepared, if in one way."""
    folders = {url_path(shard).rpartition("/")[0] for shard in shards}
    contents = [_parse_json(files.read(_join(folder, MANIFEST), _LARGEST_MANIFEST)) for folder in folders]
    try:
        told = {Preprocessing(**content["preprocessing"]) for content in contents}
    except (KeyError, TypeError, ValueError):  # not the manifest of make_shards, or that of a newer version
        return None
    return told.pop() if len(told) == 1 else None


def _parse_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _exists(files: FileSystem, path: str) -> bool:
    try:
        files.size(path)
    except FileNotFoundError:
        return False
    return True


def is_shard_manifest(path: Path) -> bool:
    """Whether a file is there and lists shards."""
    try:
        content = read_json(path, _LARGEST_MANIFEST)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and isinstance(content.get("shards"), list)
