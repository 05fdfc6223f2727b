"""Images in webdataset tars, local or remote."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...files import atomic_write, read_json, read_regular
from ..images.errors import UnreadableImageError
from ..images.reading import IMAGE_EXTENSIONS, read_image
from .archives import COMPANIONS, INDEX_SUFFIX, PackedKeys, TarIndex, index_tar, parent_of, parse_index
from .filesystem import ByteRange, FileSystem, LocalFileSystem, expand_braces, is_pattern
from .remote import RemoteFileSystem, add_suffix, is_remote, url_path
from .store import ImageStore
from .walk import is_junk

__all__ = ["MANIFEST", "ShardStore", "default_cache_dir", "is_shard_manifest"]

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 2**28  # bytes
_OPENED_TOGETHER = 1000
_REPORTED = 100
_MOST_LOST = 10_000  # samples that a manifest may promise in vain, or ten times those that are there
_WORD = re.compile(r"\.[^\W\d_][^/\n]*$", re.MULTILINE)  # what may follow the key of an image


class ShardStore(ImageStore):
    """The images in webdataset tars, in the order of the shards and of their members.

    webdataset reads a shard as a stream, from its start. Exact resume and one global order for any number of processes
    need any sample at any time, hence this reader. It indexes each shard once: from `NAME.tar.index.npz` beside it
    where there is one, else by walking its headers (of a remote shard the result is kept in a cache folder). Then it
    reads images by ranges of bytes.

    A `manifest.json` beside the shards says how many samples there should be. What a missing or damaged shard lacks is
    named in a warning and keeps its place in `lost`, so that neither the length nor the order of an epoch changes.

    Args:
        pattern: A tar, a folder of tars, a glob or a brace range (`cxr-{000000..000009}.tar`), as a path or a URL.
        split: Of a folder with a manifest: only the shards of this split. None takes all.
        image_column: Which file of a sample is the image, such as `"seg.png"`; by default `KEY.png` and the like.
    """

    def __init__(self, pattern: str | Path, split: str | None = None, image_column: str = "image") -> None:
        pattern = str(pattern)
        self._files: FileSystem = RemoteFileSystem(pattern) if is_remote(pattern) else LocalFileSystem()
        self.shards, expected = _find_shards(self._files, pattern, split)
        if isinstance(self._files, RemoteFileSystem):
            self._check_ranges()
        opened: list[_Opened] = []
        with ThreadPoolExecutor(16) as pool:
            for first in range(0, len(self.shards), _OPENED_TOGETHER):
                some = self.shards[first : first + _OPENED_TOGETHER]
                opened += pool.map(lambda shard: self._open(shard, expected.get(shard), image_column), some)
                missing = [one.index.tar_bytes == 0 for one in opened]
                self._check_claims(sum(missing), len(missing) - sum(missing))
        self._check_claims(sum(one.missing for one in opened), sum(len(one.images) for one in opened))
        self._report(opened)
        names = [f"{Path(url_path(shard)).stem}#lost-" for shard in self.shards]
        padded = [_pad(one, name) for one, name in zip(opened, names, strict=True)]
        indexes, images = zip(*padded, strict=True)
        reasons = [one.reason for one in opened]
        if not any(map(len, images)):
            kind = "image" if image_column == "image" else f"KEY.{image_column}"
            raise FileNotFoundError(f"No {kind} in the {len(self.shards)} shard(s) of {self._files.show(pattern)!r}.")
        self.prepared_by = _prepared_by(self._files, self.shards) if set(self.shards) == set(expected) else None
        self._shard_ends = np.cumsum([len(image) for image in images])
        self._index = _concatenate(indexes)
        self.keys = self._index.keys
        if image_column == "image":
            self._warn_of_separated_companions()
        first = np.cumsum([0, *(len(index.kinds) for index in indexes)])
        shifted = [np.where(image >= 0, image + start, -1) for image, start in zip(images, first, strict=False)]
        self._image = np.concatenate(shifted)  # (S,): number of the file that is each sample's image, -1 if lost
        self.lost = {
            int(number): f"{self.describe(number)}: {reasons[self._shard(number)]}"
            for number in np.flatnonzero(self._image < 0)
        }

    def _warn_of_separated_companions(self) -> None:
        """Companions are looked for in the tar of their image: say that those in other tars count as images."""
        if not _WORD.search(self.keys.to_bytes().decode()):
            return
        keys = set(self.keys)
        if apart := [key for key in self.keys if parent_of(key, keys)]:
            logger.warning(
                "%d of %d samples, such as %s, look like companions of images in other tars, and are taken for images "
                "themselves. Put each into the tar of its image.",
                *(len(apart), len(keys), apart[0]),
            )

    @property
    def shard_sizes(self) -> list[int]:
        return np.diff(self._shard_ends, prepend=0).tolist()

    def describe(self, index: int) -> str:
        """The file in its tar, or only the tar where the file is lost."""
        shard = self._files.show(self.shards[self._shard(index)])
        if self._image[index] < 0:
            return shard
        return f"{shard}:{self.keys[index]}.{self._index.extensions[self._index.kinds[self._image[index]]]}"

    def read(self, index: int) -> np.ndarray:
        (image,) = self.read_many([index])
        if isinstance(image, UnreadableImageError):
            raise image
        return image

    def read_many(self, indices: Sequence[int]) -> Iterator[np.ndarray | UnreadableImageError]:
        """The pixels of several samples; their bytes are fetched at once."""
        contents = self._fetch([index for index in indices if index not in self.lost])
        for index in indices:
            try:
                yield self._decode(index, *((None, b"") if index in self.lost else next(contents)))
            except UnreadableImageError as error:
                yield error

    def companion(self, index: int, extension: str) -> bytes:
        files = self._index.files(index)
        if extension not in files:
            raise KeyError(f"{self.describe(index)} has no companion {extension!r}, but {', '.join(files)}")
        (content,) = self._files.read_ranges([ByteRange(self.shards[self._shard(index)], *files[extension])])
        return content

    def _fetch(self, indices: Sequence[int]) -> Iterator[tuple[ByteRange, bytes]]:
        """Where the images of samples are, and their bytes."""
        places = self._places(indices)
        try:
            yield from zip(places, self._files.read_ranges(places), strict=True)
        except (ConnectionError, PermissionError) as error:
            names = ", ".join(self.keys[index] for index in indices[:3])
            raise type(error)(f"{error} Samples {names} and perhaps others were wanted.") from None

    def _decode(self, index: int, place: ByteRange | None, content: bytes) -> np.ndarray:
        if place is None:
            raise UnreadableImageError(f"Cannot read {self.lost[index]}")
        if len(content) < place.size:
            raise UnreadableImageError(f"Cannot read {self.describe(index)}: the shard is gone or ends within it")
        return read_image(content, partial(self.describe, index))

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._shard_ends, index, side="right"))

    def _places(self, indices: Sequence[int]) -> list[ByteRange]:
        members = self._image[indices]
        shards = np.searchsorted(self._shard_ends, indices, side="right").tolist()
        offsets, sizes = self._index.offsets[members].tolist(), self._index.sizes[members].tolist()
        return [ByteRange(self.shards[shard], *place) for shard, *place in zip(shards, offsets, sizes, strict=True)]

    def _check_ranges(self) -> None:
        for shard in self.shards:
            try:
                return self._files.check_ranges(shard)
            except FileNotFoundError:  # a missing shard tells nothing of the server
                continue

    def _open(self, shard: str, promised: dict[str, Any] | None, image_column: str) -> _Opened:
        expected = promised["samples"] if promised else None
        try:
            whole = _open_index(self._files, shard)
            index, images, left_out = _keep_images(whole, image_column)
            reason = whole.damage
            if not reason and promised and promised.get("bytes") not in (None, whole.tar_bytes):
                reason = f"has {whole.tar_bytes} bytes, not {promised['bytes']} as its manifest says"
        except (FileNotFoundError, ValueError) as error:
            if expected is None:
                raise
            none = np.zeros(0, np.int64)
            index = TarIndex(0, PackedKeys(), (), np.zeros(1, np.int64), none.astype(np.int32), none, none)
            images, left_out = none, []
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be used: {error}"
        missing = max(0, (expected or 0) - len(images))
        if missing and not reason:
            reason = "is shorter than its manifest says"
        return _Opened(index, images, expected, missing, reason, left_out)

    def _check_claims(self, lost: int, there: int) -> None:
        """Refuse a manifest that names far more than there is, before places for that are made."""
        if lost > max(_MOST_LOST, 10 * there):
            folder = self._files.show(url_path(self.shards[0]).rpartition("/")[0])
            raise ValueError(
                f"{MANIFEST} in {folder!r} names {len(self.shards):,} shards, but {lost:,} of the shards or samples "
                "that it promises are missing. Copy the shards again, or rename the manifest to read them without it."
            )

    def _report(self, opened: Sequence[_Opened]) -> None:
        """Say what is wrong with the first few shards, and with how many others."""
        lines = []
        for shard, one in zip(self.shards, opened, strict=True):
            used, shard = len(one.images), self._files.show(shard)
            lines += [f"{shard}: left out: {clause}" for clause in one.left_out]
            if one.reason:
                count = f"{one.missing} of {one.expected}" if one.expected is not None else "an unknown number of"
                lines.append(f"{shard} {one.reason}: {count} samples are lost, {used} are used")
            if one.expected is not None and used > one.expected:
                lines.append(f"{shard} holds {used} samples, not {one.expected} as its manifest says")
        for line in lines[:_REPORTED]:
            logger.warning("Shard %s", line)
        if len(lines) > _REPORTED:
            logger.warning("There are %d more findings of this kind about shards", len(lines) - _REPORTED)


class _Opened(NamedTuple):
    """A shard: the number `(S,)` of each sample's image among its files, and how many samples it lacks, and why."""

    index: TarIndex
    images: np.ndarray
    expected: int | None
    missing: int
    reason: str
    left_out: list[str]


def is_shard_manifest(path: Path) -> bool:
    """Whether a file is there and lists shards."""
    try:
        content = read_json(path, _LARGEST_MANIFEST)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and isinstance(content.get("shards"), list)


def _find_shards(files: FileSystem, pattern: str, split: str | None) -> tuple[list[str], dict[str, dict]]:
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


def _prepared_by(files: FileSystem, shards: Sequence[str]) -> str | None:
    """How the images of shards that are in a manifest were prepared, if in one way."""
    folders = {url_path(shard).rpartition("/")[0] for shard in shards}
    contents = [_parse_json(files.read(_join(folder, MANIFEST), _LARGEST_MANIFEST)) for folder in folders]
    told = {str(content.get("preprocessing_hash") or "") for content in contents}
    return (told.pop() or None) if len(told) == 1 else None


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


def default_cache_dir() -> Path:
    """Where what was learned of remote shards is kept: `$XDG_CACHE_HOME/diffusers-dino`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusers-dino"


def _open_index(files: FileSystem, shard: str) -> TarIndex:
    """The index of a shard: the one beside it, one that was made before, or a new one."""
    size = files.size(shard)
    try:
        return parse_index(files.read(add_suffix(shard, INDEX_SUFFIX), size + 2**16), size)
    except (FileNotFoundError, PermissionError):
        pass
    except ValueError as error:
        logger.warning("The index beside %s is not used: %s. Reading its headers.", files.show(shard), error)
    if not isinstance(files, RemoteFileSystem):
        with files.open(shard) as file:
            return index_tar(file, shard, size)
    name = hashlib.sha256(f"{files.show(shard)}\n{files.version(shard)}".encode()).hexdigest()
    cached = default_cache_dir() / "indexes" / f"{name}.npz"
    try:
        return parse_index(read_regular(cached, size + 2**16), size)
    except (OSError, ValueError):
        logger.info("Reading %s whole, once: it has no index beside it", files.show(shard))
    with files.open(shard) as file:
        index = index_tar(file, files.show(shard), size)
    if not index.damage:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(cached) as file:
                file.write(index.to_bytes())
        except OSError as error:
            logger.warning("Cannot keep %s: %s", cached, error)
    return index


def _keep_images(index: TarIndex, image_column: str) -> tuple[TarIndex, np.ndarray, list[str]]:
    """The samples that have an image, the number `(S,)` of the file that is it, and clauses on what is left out."""
    if not len(index.keys):
        return index, np.zeros(0, np.int64), []
    left_out = []
    index, joined = _join_companions(index)
    if joined:
        left_out.append(f"{COMPANIONS}: {joined}")
    order = {extension: rank for rank, extension in enumerate(IMAGE_EXTENSIONS)}
    order = order if image_column == "image" else {image_column.lower(): 0}
    ranks = np.array([order.get(extension, len(order)) for extension in index.extensions])[index.kinds]  # (M,)
    count = len(ranks)
    best = np.minimum.reduceat(ranks * count + np.arange(count), index.first_member[:-1])  # (S,): rank, then number
    kept = best < len(order) * count
    if not kept.all():
        left_out.append(f"samples without an image: {np.count_nonzero(~kept)} of {len(kept)}")
    if is_junk(index.keys.to_bytes().decode()):
        junk = np.array([is_junk(key) for key in index.keys])
        left_out.append(f"hidden files and those of systems: {np.count_nonzero(junk & kept)}")
        kept &= ~junk
    if kept.all():
        return index, best % count, left_out
    members = np.repeat(kept, np.diff(index.first_member))
    renumbered = np.cumsum(members) - 1
    return _select(index, kept, members), renumbered[best[kept] % count], left_out


def _join_companions(index: TarIndex) -> tuple[TarIndex, int]:
    """Put `KEY.seg.png` to the sample of the image `KEY`, as its file `seg.png`; how many images that were."""
    if not _WORD.search(index.keys.to_bytes().decode()):  # as with most sets
        return index, 0
    is_image = np.isin(index.kinds, [n for n, one in enumerate(index.extensions) if one in IMAGE_EXTENSIONS])
    has_image = np.logical_or.reduceat(is_image, index.first_member[:-1])
    number_of = {key: number for number, key in enumerate(index.keys) if has_image[number]}
    owners, kinds = np.arange(len(index.keys)), index.kinds.copy()
    known = {extension: number for number, extension in enumerate(index.extensions)}
    for number, key in enumerate(index.keys):
        found = parent_of(key, number_of)
        if found is None and not has_image[number]:
            found = next(((parent, "") for parent in (f"{key}.image", f"{key}.img") if parent in number_of), None)
        if found is not None:
            owners[number] = number_of[found[0]]
            for member in range(index.first_member[number], index.first_member[number + 1]):
                extension = f"{found[1]}.{index.extensions[kinds[member]]}".lower().removeprefix(".")
                kinds[member] = known.setdefault(extension, len(known))
    kept = owners == np.arange(len(owners))
    if kept.all():
        return index, 0
    order = np.argsort(np.repeat(owners, np.diff(index.first_member)), kind="stable")
    sizes = np.bincount(owners, np.diff(index.first_member), len(owners)).astype(np.int64)
    sorted_columns = {"kinds": kinds[order], "offsets": index.offsets[order], "sizes": index.sizes[order]}
    joined = replace(index, extensions=tuple(known), first_member=np.cumsum([0, *sizes]), **sorted_columns)
    return _select(joined, kept, np.ones(len(kinds), bool)), int(np.count_nonzero(has_image & ~kept))


def _select(index: TarIndex, samples: np.ndarray, members: np.ndarray) -> TarIndex:
    """The samples and their files for which these masks, `(S,)` and `(M,)`, are true."""
    columns = {name: getattr(index, name)[members] for name in ("kinds", "offsets", "sizes")}
    keys = PackedKeys([index.keys[number] for number in np.flatnonzero(samples)])
    first = np.cumsum([0, *np.diff(index.first_member)[samples]])
    return replace(index, keys=keys, first_member=first, **columns)


def _pad(one: _Opened, name: str) -> tuple[TarIndex, np.ndarray]:
    """Add a sample without files, named with a number, for each that is missing."""
    index, images = one.index, one.images
    if not one.missing:
        return index, images
    lost = PackedKeys([f"{name}{number:06d}" for number in range(one.missing)])
    keys = PackedKeys.from_bytes(index.keys.to_bytes() + lost.to_bytes())
    first = np.append(index.first_member, np.full(len(lost), index.first_member[-1]))
    return replace(index, keys=keys, first_member=first), np.append(images, np.full(len(lost), -1))


def _concatenate(indexes: Sequence[TarIndex]) -> TarIndex:
    """One index of the samples of all shards; offsets stay those within each shard."""
    extensions = tuple(sorted({extension for index in indexes for extension in index.extensions}))
    number = {extension: i for i, extension in enumerate(extensions)}
    kinds = [np.array([number[e] for e in index.extensions], np.int32)[index.kinds] for index in indexes]
    starts = np.cumsum([0, *(len(index.kinds) for index in indexes)])
    first = [index.first_member[:-1] + start for index, start in zip(indexes, starts, strict=False)]
    return TarIndex(
        sum(index.tar_bytes for index in indexes),
        PackedKeys.from_bytes(b"".join(index.keys.to_bytes() for index in indexes)),
        extensions,
        np.concatenate([*first, starts[-1:]]),
        np.concatenate(kinds),
        np.concatenate([index.offsets for index in indexes]),
        np.concatenate([index.sizes for index in indexes]),
    )
