"""Images in webdataset tars, local or remote."""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...files import atomic_write, read_regular
from ..images.errors import UnreadableImageError
from ..images.reading import read_image
from .archives import INDEX_SUFFIX, PackedKeys, TarIndex, index_tar, parse_index
from .filesystem import ByteRange, FileSystem, LocalFileSystem
from .members import concatenate, keep_images, pad, separated_companions
from .remote import RemoteFileSystem, add_suffix, is_remote, url_path
from .shard_list import MANIFEST, find_shards, prepared_by
from .store import ImageStore

__all__ = ["ShardStore"]

logger = logging.getLogger(__name__)

_OPENED_TOGETHER = 1000
_REPORTED = 100
_MOST_LOST = 10_000  # samples that a manifest may promise in vain, or ten times those that are there


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
        self.shards, expected = find_shards(self._files, pattern, split)
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
        padded = [pad(one.index, one.images, one.missing, name) for one, name in zip(opened, names, strict=True)]
        indexes, images = zip(*padded, strict=True)
        reasons = [one.reason for one in opened]
        if not any(map(len, images)):
            kind = "image" if image_column == "image" else f"KEY.{image_column}"
            raise FileNotFoundError(f"No {kind} in the {len(self.shards)} shard(s) of {self._files.show(pattern)!r}.")
        self.prepared_by = prepared_by(self._files, self.shards) if set(self.shards) == set(expected) else None
        self._shard_ends = np.cumsum([len(image) for image in images])
        self._index = concatenate(indexes)
        self.keys = self._index.keys
        if image_column == "image" and (apart := separated_companions(self.keys)):
            logger.warning(
                "%d of %d samples, such as %s, look like companions of images in other tars, and are taken for images "
                "themselves. Put each into the tar of its image.",
                *(len(apart), len(self.keys), apart[0]),
            )
        first = np.cumsum([0, *(len(index.kinds) for index in indexes)])
        shifted = [np.where(image >= 0, image + start, -1) for image, start in zip(images, first, strict=False)]
        self._image = np.concatenate(shifted)  # (S,): number of the file that is each sample's image, -1 if lost
        self.lost = {
            int(number): f"{self.describe(number)}: {reasons[self._shard(number)]}"
            for number in np.flatnonzero(self._image < 0)
        }

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

    def mark(self, index: int) -> str:
        """The size of the image's file and, of a local shard, a checksum of its end."""
        if index in self.lost:
            return ""
        (place,) = self._places([index])
        if isinstance(self._files, RemoteFileSystem):
            return str(place.size)
        end = min(place.size, 4096)
        (content,) = self._files.read_ranges([ByteRange(place.path, place.offset + place.size - end, end)])
        return f"{place.size} {zlib.crc32(content):08x}"

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
            index, images, left_out = keep_images(whole, image_column)
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
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached = cache / "diffusers-dino" / "indexes" / f"{name}.npz"
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
