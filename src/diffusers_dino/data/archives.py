"""Local webdataset tars, read at random: each file is indexed once by the offsets of its members."""

from __future__ import annotations

import glob
import itertools
import logging
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .reading import IMAGE_EXTENSIONS

__all__ = ["Member", "expand_shards", "index_shard", "split_name"]

logger = logging.getLogger(__name__)

# Kinds of pictures that accompany an image under the same key: `KEY.mask.png` is the mask of `KEY.png`.
_COMPANIONS = ("mask",)


class Member(NamedTuple):
    """Where the bytes of one file are inside a tar."""

    shard: str
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes of the file; fewer than `size` if the tar is cut short."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def split_name(name: str) -> tuple[str, str]:
    """Split a file's name into key and extension: `"a/1.2.840.png"` -> `("a/1.2.840", "png")`.

    webdataset splits at the first dot, which turns every DICOM UID into "1". Here the key ends at the last dot, or at
    the one before it for companions such as `.mask.png`.
    """
    key, _, extension = name.rpartition(".")
    if not key or "/" in extension:
        return name, ""
    for companion in _COMPANIONS:
        if key.endswith(f".{companion}"):
            return key.removesuffix(f".{companion}"), f"{companion}.{extension.lower()}"
    return key, extension.lower()


def expand_shards(pattern: str) -> list[str]:
    """Paths of the tars that a path, a folder, a glob or a brace range (`x-{000..009}.tar`) stands for, sorted.

    Raises:
        FileNotFoundError: If nothing matches.
    """
    if Path(pattern).is_dir():
        candidates = [str(path) for path in Path(pattern).glob("*.tar")]
    else:
        candidates = []
        for path in _expand_braces(pattern):
            found = [path] if Path(path).is_file() else glob.glob(path, recursive=True)
            if not found:
                hint = "Give tar files, a glob or a brace range such as {000..009}."
                raise FileNotFoundError(f"No shard {path!r} (from {pattern!r}). {hint}")
            candidates += found
    if not candidates:
        raise FileNotFoundError(f"No .tar file in {pattern!r}.")
    return sorted(set(candidates))


def _expand_braces(pattern: str) -> Iterator[str]:
    """Expand `{000..012}` and `{a,b}` as a shell does; leading zeros are kept."""
    parts: list[list[str]] = []
    for text in re.split(r"(\{[^{}]*\})", pattern):
        numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", text)
        if numbers:
            first, last = numbers.groups()
            parts.append([f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)])
        elif text.startswith("{") and "," in text:
            parts.append(text[1:-1].split(","))
        else:
            parts.append([text])
    return ("".join(choice) for choice in itertools.product(*parts))


def index_shard(path: str) -> dict[str, dict[str, Member]]:
    """List the regular files of a tar by key and extension. Nothing is extracted, links are ignored.

    A tar that ends too early is named in a warning; what is complete in it is used.

    Returns:
        `{key: {extension: member}}` in the order of the tar. Samples without an image are left out.

    Raises:
        ValueError: If the file is no tar.
    """
    samples: dict[str, dict[str, Member]] = {}
    size = Path(path).stat().st_size
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                end = info.offset_data + info.size
                if info.isreg() and end <= size:
                    key, extension = split_name(info.name)
                    member = Member(path, info.name, info.offset_data, info.size)
                    samples.setdefault(key, {}).setdefault(extension, member)
    except tarfile.ReadError as error:
        if not samples:
            raise ValueError(f"{path!r} is not a tar file, or is compressed or damaged: {error}") from error
        end = size + 1
    # A finished tar closes with two blocks of 512 zeros after the last member.
    if end + 1024 > size:
        logger.warning("Shard %s ends too early: %d samples of it are used, those after are lost", path, len(samples))
    return {key: files for key, files in samples.items() if image_member(files)}


def image_member(files: dict[str, Member]) -> Member | None:
    """The member that holds a sample's image, if it has one."""
    return next((files[extension] for extension in IMAGE_EXTENSIONS if extension in files), None)
