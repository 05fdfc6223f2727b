"""Map-style data sets of prepared images."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..seeds import derive_seed
from .images.errors import NoImageError, UnreadableImageError
from .images.preprocessing import Preprocessing, refuse_blank
from .keys import find_keys
from .order import WindowedOrder
from .stores import ImageStore, open_store

__all__ = ["ImageDataset", "collate", "open_images", "to_float"]

logger = logging.getLogger(__name__)

# How many images are read at once to fill the memory: enough to hide the way to a remote store.
_READ_TOGETHER = 16


class ImageDataset(Dataset[dict[str, Any]]):
    """Prepared images of a source, by number.

    An image that cannot be read is named in a warning and counted in `unreadable`, and its place goes to another
    sample, which depends only on its number: length and order stay the same in every process and every run. More than
    `max_unreadable` raise `ValueError`, also later, when it turns out. DICOM files of other kinds, such as reports, do
    not count.

    That is for training. A protocol that counts images must not count one twice: `read_many(..., replace=False)` gives
    None for a lost one.

    Args:
        store: Where the images come from.
        preprocessing: How they are prepared. What shards say was done before is not done again: see `Preprocessing`.
        in_memory: Whether to prepare all images now and keep them as uint8 (`size * size` bytes each for grayscale).
        max_unreadable: Largest tolerated fraction of unreadable images.
        indices: Which samples of the source to use, all by default.

    Attributes:
        unreadable: Message by number of each image that could not be read so far, by this process or its workers.
        not_images: The numbers of those that are sound files of another kind.
    """

    def __init__(
        self,
        store: ImageStore,
        preprocessing: Preprocessing,
        in_memory: bool = False,
        max_unreadable: float = 0.05,
        indices: Sequence[int] | None = None,
    ) -> None:
        if not 0 <= max_unreadable <= 1:
            raise ValueError(f"max_unreadable is a fraction in [0, 1], got {max_unreadable}")
        self.store = store
        self.preprocessing = preprocessing
        self.max_unreadable = max_unreadable
        self.unreadable: dict[int, str] = {}
        self.not_images: set[int] = set()
        self._indices = np.arange(len(store.keys)) if indices is None else np.asarray(indices, np.int64)
        if store.lost:
            places = enumerate(self._indices.tolist())
            self.unreadable = {place: store.lost[index] for place, index in places if index in store.lost}
            self._check_unreadable()
        self._prepared: list[np.ndarray | None] | None = None
        if in_memory:
            chunks = [range(i, min(i + _READ_TOGETHER, len(self))) for i in range(0, len(self), _READ_TOGETHER)]
            with ThreadPoolExecutor() as pool:  # decoders let go of the interpreter's lock
                prepared = pool.map(lambda chunk: list(self._prepare(chunk)), chunks)
                self._prepared = [array for chunk in prepared for array in chunk]
            self._check_unreadable()

    @property
    def keys(self) -> list[str]:
        """The keys of the samples, in order."""
        return [self.store.keys[index] for index in self._indices.tolist()]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: `key`, and `image` as float32 `(C, size, size)` in [0, 1], C being 1 or, for colour, 3."""
        ((key, array),) = self.read_many([index])
        return {"key": key, "image": to_float(array)}

    def read_many(self, indices: Sequence[int], replace: bool = True) -> Iterator[tuple[str, np.ndarray | None]]:
        """Key and prepared image of several samples, fetched at once.

        Another one stands in for an unreadable one; with `replace=False` its image is None.
        """
        places = [range(len(self))[index] for index in indices]
        keys = [self.store.keys[index] for index in self._indices[places].tolist()]
        for place, key, array in zip(places, keys, self._prepare(places), strict=True):
            if array is None and replace:
                used, array = self._substitute(place)
                key = self.store.keys[int(self._indices[used])]
            elif array is None:
                self._check_unreadable()
            yield key, array

    def order(self, window_shards: int) -> WindowedOrder | None:
        """The windowed shuffle over this data set's shards for `GlobalBatchSampler`; None, a full one, for 0."""
        if not window_shards:
            return None
        ends = np.cumsum(self.store.shard_sizes)
        shards = np.searchsorted(ends, self._indices, side="right")  # a selection keeps the order of the store
        return WindowedOrder(np.bincount(shards, minlength=len(ends)).tolist(), window_shards)

    def select(self, keys: Sequence[str]) -> ImageDataset:
        """The samples of the given keys, in this data set's order; raises `KeyError` if it lacks one.

        Other spellings of a key are known as well: see `keys.match_keys`.
        """
        known = self.keys
        found = {known[place] for place in find_keys(keys, known, "keys are not in the data set")}
        places = [place for place, key in enumerate(known) if key in found]
        selection = ImageDataset(self.store, self.preprocessing, False, self.max_unreadable, self._indices[places])
        if self._prepared is not None:
            selection._prepared = [self._prepared[place] for place in places]
        selection.unreadable = {new: self.unreadable[old] for new, old in enumerate(places) if old in self.unreadable}
        selection.not_images = {new for new, old in enumerate(places) if old in self.not_images}
        return selection

    def resized(self, size: int) -> ImageDataset:
        """The same samples, prepared as squares of another size in pixels."""
        if self.preprocessing.size == size:
            return self
        preprocessing = replace(self.preprocessing, size=size)
        return ImageDataset(self.store, preprocessing, max_unreadable=self.max_unreadable, indices=self._indices)

    def note_unreadable(self, messages: Mapping[int, str], not_images: Collection[int] = ()) -> None:
        """Count what another process could not read, by number; raises `ValueError` if it is too much."""
        self.unreadable.update(messages)
        self.not_images.update(not_images)
        if messages:
            self._check_unreadable()

    def read_raw(self, index: int) -> np.ndarray:
        """The pixels of a sample before they are prepared, as `read_image` gives them; `UnreadableImageError`."""
        return self.store.read(int(self._indices[index]))

    def marks(self) -> Iterator[str]:
        """For each sample what changes when its file is another one: see `ImageStore.mark`."""
        with ThreadPoolExecutor(_READ_TOGETHER) as pool:  # most of the time a network drive is waited for
            for first in range(0, len(self), 1000):  # a task of each would take much memory
                yield from pool.map(self.store.mark, self._indices[first : first + 1000].tolist())

    def companion(self, index: int, extension: str) -> bytes:
        """The file beside an image with the same key, such as `"json"` or `"mask.png"`; raises `KeyError`."""
        return self.store.companion(int(self._indices[index]), extension)

    def _prepare(self, places: Sequence[int]) -> Iterator[np.ndarray | None]:
        """The prepared images; for those that cannot be read None, with the reason in `unreadable`."""
        if self._prepared is not None:
            yield from (self._prepared[place] for place in places)
            return
        known = [place in self.unreadable for place in places]
        wanted = [place for place, bad in zip(places, known, strict=True) if not bad]
        images = self.store.read_many(self._indices[wanted].tolist())
        for place, bad in zip(places, known, strict=True):
            image = None if bad else self._finish(place, next(images))
            if isinstance(image, UnreadableImageError):
                self.unreadable[place] = str(image)
                if isinstance(image, NoImageError):
                    self.not_images.add(place)
                logger.warning("%s. Skipped: in training another sample takes its place.", image)
                image = None
            yield image

    def _finish(self, place: int, image: np.ndarray | UnreadableImageError) -> np.ndarray | UnreadableImageError:
        """The prepared image, or why there is none."""
        if isinstance(image, UnreadableImageError):
            return image
        image = self.preprocessing(image, self.store.prepared_by)
        try:
            refuse_blank(image, self.store.describe(int(self._indices[place])))
        except UnreadableImageError as error:
            return error
        return image

    def _substitute(self, wanted: int) -> tuple[int, np.ndarray]:
        """Another sample for a place whose own cannot be read; which one depends only on the number."""
        attempt = 0
        while True:
            self._check_unreadable()
            attempt += 1
            place = derive_seed("substitute", wanted, attempt) % len(self)
            (array,) = self._prepare([place])
            if array is not None:
                return place, array

    def _check_unreadable(self) -> None:
        damaged = [place for place in self.unreadable if place not in self.not_images]
        if len(damaged) > self.max_unreadable * len(self) or len(self.unreadable) == len(self):
            examples = "; ".join(self.unreadable[place] for place in (damaged or list(self.unreadable))[:3])
            raise ValueError(
                f"{len(damaged or self.unreadable)} of {len(self)} images cannot be read, more than the tolerated "
                f"{self.max_unreadable:.1%} (max_unreadable). {examples}"
            )


def open_images(
    source: str | Path,
    preprocessing: Preprocessing,
    *,
    split: str = "train",
    image_column: str = "image",
    config_name: str | None = None,
    in_memory: bool = False,
    max_unreadable: float = 0.05,
    local_files_only: bool = False,
) -> ImageDataset:
    """Open a collection of images for random access.

    Args:
        source: A folder of images (with subfolders), or a pattern such as `FOLDER/**/*.png`; webdataset tars as a
            path, a folder of them, a glob or a brace range, here or behind `http(s)://`, `s3://`, `gs://` or `hf://`;
            a `datasets` folder (`save_to_disk` or Parquet) or a data set of the Hub.
        preprocessing, in_memory, max_unreadable: See `ImageDataset`, also for what it raises.
        split: Split of a `datasets` set, or of a folder of shards whose manifest names splits.
        image_column: Column of images of a `datasets` set; in tars, which file of a sample is the image, such as
            `"seg.png"`.
        config_name: Configuration of a `datasets` set.
        local_files_only: Whether a name that is not here is an error, rather than looked for on the Hub.

    Raises:
        FileNotFoundError: If the source does not exist, or holds no image.
        ValueError: If the source is of another kind, or a folder of several kinds.
    """
    opened = open_store(source, split, image_column, config_name, local_files_only)
    return ImageDataset(opened, preprocessing, in_memory, max_unreadable)


def to_float(array: np.ndarray) -> Tensor:
    """uint8 `(H, W)` or `(H, W, 3)` -> float32 `(1, H, W)` or `(3, H, W)` in [0, 1]."""
    tensor = torch.from_numpy(np.require(array, requirements="W"))  # decoders give read-only ones
    tensor = tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)
    return tensor.float().div_(255)


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples of an `ImageDataset` -> `key` (list) and `image` `(B, C, H, W)`; C is 3 if any of them is colour."""
    images = [sample["image"] for sample in samples]
    channels = max(len(image) for image in images)
    stacked = torch.stack([image.expand(channels, -1, -1) for image in images])
    return {"key": [sample["key"] for sample in samples], "image": stacked}
