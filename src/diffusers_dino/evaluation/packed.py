"""Prepared images as one array on disk, which processes that train side by side share through the page cache.

A grid of classifiers reads the same images hundreds of times: decoding them only once is what makes it fast.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ..data.datasets import ImageDataset, to_float
from ..files import atomic_write, read_json, sha256_of, write_json
from ..pixels import unit_to_uint8, with_channels

__all__ = ["GRAY", "PackedImages", "pack_images", "readable_images"]

logger = logging.getLogger(__name__)

GRAY = "gray is the mean of the colours, then stretched"  # older versions stretched first, or weighted the colours

_READ_TOGETHER = 64
_LARGEST_FACTS = 4 << 30  # bytes


class PackedImages:
    """Images that `pack_images` wrote to a `.npy` file, by number. It travels to other processes as a path.

    Attributes:
        recipe: A digest of what the pixels depend on.
        num_averaged: How many images had colours and became gray; None in files of old versions, which did not count
            them and weighted the colours (ITU-R BT.601).
        sha256: Of the `.npy` file; None in files of older versions.
        originals: A digest of `ImageDataset.marks`; None in files of older versions.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        facts = read_json(_facts_path(self.path), _LARGEST_FACTS)
        try:
            self.keys: tuple[str, ...] = tuple(facts["keys"])
            self.recipe: str = facts["recipe"]
            self.sha256: str | None = facts.get("sha256")
            self.originals: str | None = facts.get("originals")
            self.num_averaged: int | None = facts.get("num_averaged")
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{_facts_path(self.path)} is damaged: delete it and run again.") from error
        if len(self.array) != len(self.keys):
            raise ValueError(f"{path} holds {len(self.array)} images for {len(self.keys)} keys: delete it, run again.")

    @cached_property
    def array(self) -> np.ndarray:
        """uint8 `(N, size, size)` or `(N, size, size, 3)`, read as it is needed."""
        try:
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (EOFError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): delete it and run again.") from error
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim not in (3, 4):
            raise ValueError(f"{self.path} holds no packed images: delete it and run again.")
        return array

    @cached_property
    def places(self) -> dict[str, int]:
        """The number of each key."""
        return {key: place for place, key in enumerate(self.keys)}

    def __len__(self) -> int:
        return len(self.keys)

    def __reduce__(self) -> tuple[type[PackedImages], tuple[Path]]:
        return PackedImages, (self.path,)


def pack_images(images: ImageDataset, path: str | Path, recipe: str = "", channels: int = 1) -> PackedImages:
    """Read all images once and write them to a `.npy` file, whole or not at all; what is there already is kept.

    Images that cannot be read are left out: another sample in their place would have labels that are not its own.
    Channels are 1 for gray, the mean of the colours, or 3 for colour. The mean is taken before an image is prepared,
    since preparing stretches what there is to the whole range: the gray of a colour photograph is then that of a gray
    copy of it, such as a synthesis stores. `recipe` says what else the pixels depend on, such as the digest of a plan:
    a file of another recipe, of other keys or another preprocessing is written anew.

    ValueError if the file there is damaged, or its images have changed since, as what was made from it has not.
    """
    if channels not in (1, 3):
        raise ValueError(f"Images have 1 or 3 channels, got {channels}.")
    path = Path(path)
    plain = _digest(recipe, images.preprocessing.fingerprint(), str(channels), *images.keys)
    averaged = _digest(plain, GRAY)
    originals = _digest(*images.marks())
    packed = PackedImages(path) if path.is_file() and _facts_path(path).is_file() else None
    if packed is None or packed.num_averaged is None or packed.recipe not in (plain, averaged):
        packed = _pack(images, path, channels, (plain, averaged), originals)
    elif packed.originals not in (None, originals):
        raise ValueError(
            f"{path} was packed from other images of these names. Give another folder for the results, or delete it "
            "and what was made from it."
        )
    elif packed.sha256 not in (None, sha256_of(path)):
        raise ValueError(f"{path} is damaged (its pixels have changed): delete it and run again.")
    if lost := len(images) - len(packed):
        logger.warning("%d of %d images for %s cannot be read and are left out.", lost, len(images), path)
    return packed


def _pack(images: ImageDataset, path: Path, channels: int, recipes: tuple[str, str], originals: str) -> PackedImages:
    """Write the images; the first recipe is for those of which none had colours that were averaged."""
    _facts_path(path).unlink(missing_ok=True)  # an array without facts is not there
    size = images.preprocessing.size
    shape = (len(images), size, size) if channels == 1 else (len(images), size, size, 3)
    keys, num_averaged = [], 0
    with atomic_write(path) as file:
        _write_header(file, shape)
        for place, key, image in readable_images(images):
            keys.append(key)
            if image.ndim > 2 and channels == 1:
                image = _gray(images, place)
                num_averaged += 1
            pixels = unit_to_uint8(with_channels(to_float(image), channels))  # (channels, size, size)
            file.write(pixels.movedim(0, -1).numpy().tobytes())
        if len(keys) < len(images):  # the header says how many there are, and has room for fewer
            file.seek(0)
            _write_header(file, (len(keys), *shape[1:]))
    facts = {"recipe": recipes[num_averaged > 0], "num_averaged": num_averaged, "sha256": sha256_of(path)}
    write_json(_facts_path(path), facts | {"originals": originals, "keys": keys}, indent=None)
    return PackedImages(path)


def readable_images(images: ImageDataset) -> Iterator[tuple[int, str, np.ndarray]]:
    """Number, key and prepared image of each sample but those that cannot be read: none stands in for another."""
    numbers = range(len(images))
    for first in numbers[::_READ_TOGETHER]:
        some = numbers[first : first + _READ_TOGETHER]
        found = zip(some, images.read_many(some, replace=False), strict=True)
        yield from ((number, key, image) for number, (key, image) in found if image is not None)


def _gray(images: ImageDataset, place: int) -> np.ndarray:
    """A colour image made gray and then prepared: uint8 `(size, size)`."""
    raw = images.read_raw(place)
    gray = raw.mean(axis=2, dtype=np.float32)
    gray = gray.round().astype(np.uint8) if raw.dtype == np.uint8 else gray
    preprocessing = images.preprocessing
    if preprocessing.is_cut(raw, images.store.prepared_by):
        preprocessing = replace(preprocessing, remove_borders=False)
    return preprocessing(gray)


def _write_header(file, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _facts_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()
