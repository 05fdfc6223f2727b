"""Webdataset tars read at random, by an index of each: where the bytes of every sample are.

Its few NumPy arrays take tens of megabytes for a million samples, shared by forked workers. It can be kept beside its
tar, as `train-000000.tar.index.npz`, so that a remote shard is opened without walking its headers.
"""

from __future__ import annotations

import errno
import io
import logging
import re
import tarfile
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ...files import atomic_write
from .walk import printable

__all__ = [
    "COMPANIONS",
    "INDEX_SUFFIX",
    "PackedKeys",
    "TarIndex",
    "index_tar",
    "parent_of",
    "parse_index",
    "split_name",
    "write_index",
]

logger = logging.getLogger(__name__)

INDEX_SUFFIX = ".index.npz"
_FORMAT = 1
_BLOCK = 512
# Kinds of pictures that accompany an image under the same key: `KEY.mask.png` is the mask of `KEY.png`.
_COMPANIONS = ("mask",)
COMPANIONS = "pictures that accompany an image, as KEY.seg.png does KEY.png"
# Keys become file names: a key must not lead out of a folder, nor hold the line break that separates keys here.
_UNSAFE = re.compile(r"^$|^/|^[A-Za-z]:|\\|(^|/)\.{1,2}(/|$)|[\x00-\x1f\x7f]")


def split_name(name: str) -> tuple[str, str]:
    """Split a file's name into key and extension: `"a/1.2.840.png"` -> `("a/1.2.840", "png")`.

    webdataset splits at the first dot, which turns every DICOM UID into "1". Here the key ends at the last dot, or at
    the one before it for companions such as `.mask.png`.
    """
    key, _, extension = name.rpartition(".")
    if not key or "/" in extension:
        return name, ""
    for companion in _COMPANIONS:
        if key.lower().endswith(f".{companion}"):
            return key[: -len(companion) - 1], f"{companion}.{extension.lower()}"
    return key, extension.lower()


def parent_of(key: str, keys: Container[str]) -> tuple[str, str] | None:
    """Which image an image accompanies, and as what: `KEY` and `seg` for `KEY.seg`, if `keys` has `KEY`.

    Without `KEY`, it may be `KEY.image`. The word begins with a letter: `1.2.840.7` does not accompany `1.2.840`.
    """
    dot = key.find(".", key.rfind("/") + 1)
    while dot >= 0:
        base, word = key[:dot], key[dot + 1 :]
        if word[:1].isalpha():
            for parent in (base, f"{base}.image", f"{base}.img"):
                if parent in keys and parent != key:
                    return parent, word
        dot = key.find(".", dot + 1)
    return None


class PackedKeys(Sequence[str]):
    """Strings without line breaks, in two arrays. Reading one in a forked worker copies no page of memory."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._unpack("".join(f"{key}\n" for key in keys).encode())

    @classmethod
    def from_bytes(cls, packed: bytes) -> PackedKeys:
        """Keys in UTF-8, each closed by a line break, as `to_bytes` gives them."""
        keys = cls.__new__(cls)
        keys._unpack(packed)
        return keys

    def to_bytes(self) -> bytes:
        """What `from_bytes` reads."""
        return self._bytes.tobytes()

    def _unpack(self, packed: bytes) -> None:
        self._bytes = np.frombuffer(packed, np.uint8)
        self._ends = np.flatnonzero(self._bytes == ord("\n"))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) + 1 if index else 0
        return str(self._bytes.data[start : int(self._ends[index])], "utf-8")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class TarIndex:
    """The samples of one tar of `tar_bytes`, in the order of their first files.

    Attributes:
        first_member: `(S + 1,)` int64. Files `first_member[i] : first_member[i + 1]` belong to sample i.
        kinds: `(M,)` int32, the extension of each file.
        offsets, sizes: `(M,)` int64, where its bytes start and how many there are.
        damage: What is wrong with the tar, empty if nothing.
    """

    tar_bytes: int
    keys: PackedKeys
    extensions: tuple[str, ...]
    first_member: np.ndarray
    kinds: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    damage: str = ""

    def files(self, sample: int) -> dict[str, tuple[int, int]]:
        """The files of a sample: by extension, at which byte of the tar each starts, and how many bytes it has."""
        members = range(self.first_member[sample], self.first_member[sample + 1])
        return {self.extensions[self.kinds[m]]: (int(self.offsets[m]), int(self.sizes[m])) for m in members}

    def to_bytes(self) -> bytes:
        """The content of an index file, the same for the same tar."""
        buffer = io.BytesIO()
        np.savez(  # not compressed: other versions of zlib would give other bytes
            buffer,
            header=np.array([_FORMAT, self.tar_bytes], "<i8"),
            keys=np.frombuffer(self.keys.to_bytes(), np.uint8),
            extensions=np.frombuffer("\n".join(self.extensions).encode(), np.uint8),
            first_member=self.first_member.astype("<i8"),
            kinds=self.kinds.astype("<i4"),
            offsets=self.offsets.astype("<i8"),
            sizes=self.sizes.astype("<i8"),
        )
        return buffer.getvalue()


def write_index(tar: str | Path) -> Path:
    """Index a finished local tar, keep the index beside it as `NAME.tar.index.npz`, and return the index's path.

    The same tar gives the same bytes. A damaged one raises `ValueError`: its index would hide that from readers.
    """
    tar = Path(tar)
    with open(tar, "rb") as file:
        index = index_tar(file, str(tar), tar.stat().st_size)
    if index.damage:
        raise ValueError(f"{str(tar)!r} {index.damage}. Make it anew.")
    path = tar.with_name(tar.name + INDEX_SUFFIX)
    with atomic_write(path) as file:
        file.write(index.to_bytes())
    return path


def parse_index(content: bytes, tar_bytes: int) -> TarIndex:
    """Read an index file of a tar of this size. Nothing in it is trusted; `ValueError` says why it cannot be used."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            members = file.zip.infolist()
            if any(one.compress_type for one in members) or sum(one.file_size for one in members) > len(content):
                raise ValueError("it inflates")
            version, described = file["header"].tolist()
            keys = PackedKeys.from_bytes(file["keys"].tobytes())
            extensions = tuple(file["extensions"].tobytes().decode().split("\n"))
            columns = [file[name] for name in ("first_member", "kinds", "offsets", "sizes")]
        names = keys.to_bytes().decode().split("\n")[:-1]
    except Exception as error:  # zipfile and NumPy raise almost any on damaged bytes
        raise ValueError(f"it is damaged: {error}") from error
    if version != _FORMAT:
        raise ValueError(f"its format is {version}, not {_FORMAT}")
    if described != tar_bytes:
        raise ValueError(f"it describes a tar of {described} bytes, not of {tar_bytes}")
    first, kinds, offsets, sizes = columns
    consistent = (
        all(column.ndim == 1 and column.dtype.kind == "i" for column in columns)
        and len(kinds) == len(offsets) == len(sizes)
        and len(first) == len(keys) + 1
        and first[0] == 0
        and first[-1] == len(kinds)
        and (np.diff(first) > 0).all()
        and (len(kinds) == 0 or (kinds.min() >= 0 and kinds.max() < len(extensions)))
        and ((offsets >= 0) & (sizes >= 0) & (sizes <= tar_bytes) & (offsets <= tar_bytes - sizes)).all()
        and not any(_UNSAFE.search(name) for name in names)
    )
    if not consistent:
        raise ValueError("it is damaged: its parts contradict each other")
    return TarIndex(tar_bytes, keys, extensions, first, kinds, offsets, sizes)


def index_tar(file: BinaryIO, name: str, size: int) -> TarIndex:
    """Index a tar by its headers. Nothing is extracted; links, devices and names that lead elsewhere are ignored.

    After a damaged header the search goes on at the next sound one. Of two files of one name the first counts. A file
    that is not a tar, or is compressed, raises `ValueError`.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    refused: list[str] = []
    walk = _Walk(file, size)
    for info in walk:
        stored = info.name.removeprefix("./")  # `tar -cf x.tar .` puts it there
        path = printable(stored)
        key, extension = split_name(path)
        if not info.isreg() or info.issparse() or _UNSAFE.search(stored):
            refused += [] if info.isdir() else [path]
        elif extension in samples.setdefault(key, {}):
            walk.damage.append(f"holds {path!r} twice")
        else:
            samples[key][extension] = (info.offset_data, info.size)
    if refused:
        logger.warning(
            "%s: %d members are links, devices or lead out of it, and are ignored: %s",
            *(name, len(refused), ", ".join(repr(one) for one in refused[:3])),
        )
    samples = {key: files for key, files in samples.items() if files}
    if not samples and not walk.sound:
        raise ValueError(f"{name!r} is not a tar file, or is compressed or damaged.")
    extensions = sorted({extension for files in samples.values() for extension in files})
    number = {extension: i for i, extension in enumerate(extensions)}
    members = [(number[e], *place) for files in samples.values() for e, place in files.items()]
    kinds, offsets, sizes = np.array(members, np.int64).reshape(-1, 3).T
    first = np.cumsum([0, *map(len, samples.values())], dtype=np.int64)
    damage = "; ".join(walk.damage[:3]) + (f"; and {len(walk.damage) - 3} more" if len(walk.damage) > 3 else "")
    arrays = first, kinds.astype(np.int32), np.ascontiguousarray(offsets), np.ascontiguousarray(sizes)
    return TarIndex(size, PackedKeys(list(samples)), tuple(extensions), *arrays, damage)


class _Walk:
    """The members of a tar that are whole, in order; `damage` lists what was found between them."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.damage: list[str] = []
        self.sound = False  # whether it starts as a tar does, be it an empty one

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        end = 0  # where the next header is expected
        try:
            options = {"encoding": "utf-8", "errors": "surrogateescape", "ignore_zeros": True}
            with tarfile.open(fileobj=self.file, mode="r:", **options) as tar:
                for info in tar:
                    tar.members = []  # tarfile keeps all that it has seen
                    if info.offset < end or info.size < 0:
                        self.damage.append(f"has a header that leads back, at byte {info.offset}")
                        return
                    self._check_gap(end, info.offset)
                    end = info.offset_data + -(-info.size // _BLOCK) * _BLOCK
                    if info.isreg() and info.offset_data + info.size > self.size:
                        break
                    self.sound = True
                    yield info
        # A damaged extended header makes tarfile raise almost anything; a size beyond all bounds cannot be skipped.
        except (tarfile.TarError, ValueError, OSError, OverflowError, MemoryError, RecursionError, EOFError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            self.damage.append(f"ends too early, or in a damaged header, after byte {end} ({error})")
            return
        # A finished tar closes with two blocks of zeros after the last member.
        if end + 2 * _BLOCK > self.size:
            self.damage.append(f"ends too early: after {self.size} bytes")
        else:
            self._check_gap(end, self.size)

    def _check_gap(self, end: int, start: int) -> None:
        """Between members, and after the last one, there is nothing but zeros."""
        if start > end:
            position = self.file.tell()
            self.file.seek(end)
            block = self.file.read(_BLOCK)
            self.file.seek(position)
            if any(block):
                self.damage.append(f"has a damaged header at byte {end}")
            elif end == 0:
                self.sound = True
