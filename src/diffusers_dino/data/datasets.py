"""Map-style data sets of prepared images, and the views of them that training is fed with."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..seeds import derive_seed
from .augmentation import Augmentation
from .preprocessing import Preprocessing
from .reading import UnreadableImageError
from .sampling import GlobalBatchSampler, Slot
from .stores import ImageStore, open_store

__all__ = ["ImageDataset", "TrainingViews", "collate", "load_batches", "open_images", "to_float"]

logger = logging.getLogger(__name__)


class ImageDataset(Dataset[dict[str, Any]]):
    """Prepared images of a source, by number.

    An image that cannot be read is named in a warning and counted in `unreadable`, and its place goes to another
    sample, chosen by the number alone: length and order stay the same in every process and every run.

    Args:
        store: Where the images come from.
        preprocessing: How they are prepared.
        in_memory: Whether to prepare all images now and keep them as uint8 (`size * size` bytes each for grayscale).
        max_unreadable: Largest tolerated fraction of unreadable images.
        indices: Which samples of the source to use, all by default.

    Attributes:
        unreadable: Message by number of each image that could not be read so far (in this process).

    Raises:
        ValueError: If more images than tolerated cannot be read; when it shows.
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
        self._indices = range(len(store.keys)) if indices is None else list(indices)
        self._prepared: list[np.ndarray | None] | None = None
        if in_memory:
            with ThreadPoolExecutor() as pool:  # decoders let go of the interpreter's lock
                self._prepared = list(pool.map(self._prepare, range(len(self))))
            self._check_unreadable()

    @property
    def keys(self) -> list[str]:
        """The keys of the samples, in order."""
        return [self.store.keys[index] for index in self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: `key`, and `image` as float32 `(C, size, size)` in [0, 1], C being 1 or, for colour, 3."""
        used, array = self.read(index)
        return {"key": self.store.keys[self._indices[used]], "image": to_float(array)}

    def read(self, index: int) -> tuple[int, np.ndarray]:
        """The number of the sample that holds this place, and its prepared image (see `Preprocessing`)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        wanted = index = index % len(self)
        attempt = 0
        while True:
            array = self._prepare(index) if self._prepared is None else self._prepared[index]
            if array is not None:
                return index, array
            self._check_unreadable()
            attempt += 1
            index = derive_seed("substitute", wanted, attempt) % len(self)

    def select(self, keys: Sequence[str]) -> ImageDataset:
        """The samples of the given keys, in this data set's order.

        Raises:
            KeyError: If a key is not in the data set.
        """
        wanted = set(keys)
        chosen = [place for place, index in enumerate(self._indices) if self.store.keys[index] in wanted]
        missing = sorted(wanted - {self.store.keys[self._indices[place]] for place in chosen})
        if missing:
            raise KeyError(f"{len(missing)} keys are not in the data set, such as {', '.join(missing[:3])}")
        indices = [self._indices[place] for place in chosen]
        selection = ImageDataset(self.store, self.preprocessing, False, self.max_unreadable, indices)
        if self._prepared is not None:
            selection._prepared = [self._prepared[place] for place in chosen]
        selection.unreadable = {new: self.unreadable[old] for new, old in enumerate(chosen) if old in self.unreadable}
        return selection

    def companion(self, index: int, extension: str) -> bytes:
        """The file beside an image with the same key, such as `"json"` or `"mask.png"`; raises `KeyError`."""
        return self.store.companion(self._indices[index], extension)

    def _prepare(self, index: int) -> np.ndarray | None:
        """The prepared image, or None (and a note of the reason) if it cannot be read."""
        if index in self.unreadable:
            return None
        try:
            return self.preprocessing(self.store.read(self._indices[index]))
        except UnreadableImageError as error:
            self.unreadable[index] = str(error)
            logger.warning("%s. Skipped: another sample takes its place.", error)
            return None

    def _check_unreadable(self) -> None:
        if len(self.unreadable) > self.max_unreadable * len(self) or len(self.unreadable) == len(self):
            examples = "; ".join(list(self.unreadable.values())[:3])
            raise ValueError(
                f"{len(self.unreadable)} of {len(self)} images cannot be read, more than the tolerated "
                f"{self.max_unreadable:.1%} (max_unreadable). {examples}"
            )


class TrainingViews(Dataset[dict[str, Any]]):
    """What training shows at each slot of the global order: an image, augmented for its epoch.

    Args:
        images: The data set.
        augmentation: Random views, or None for the images as they are.
        seed: Seed of the run.
    """

    def __init__(self, images: ImageDataset, augmentation: Augmentation | None, seed: int = 0) -> None:
        self.images = images
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, slot: Slot) -> dict[str, Any]:
        return self.__getitems__([slot])

    def __getitems__(self, slots: Sequence[Slot]) -> dict[str, Any]:
        """A whole batch at once.

        Returns:
            `image` float32 `(B, C, size, size)` in [0, 1], `key` and `position` (lists of B).
        """
        samples = [self.images[slot.index] for slot in slots]
        batch = collate(samples)
        if self.augmentation:
            batch["image"] = self.augmentation(batch["image"], batch["key"], self.seed, [slot.epoch for slot in slots])
        batch["position"] = [slot.position for slot in slots]
        return batch


def load_batches(
    views: Dataset[dict[str, Any]], sampler: GlobalBatchSampler, num_workers: int = 0, pin_memory: bool = False
) -> Iterator[dict[str, Any]]:
    """Batches of a sampler, without end.

    Args:
        views: `TrainingViews`, or another data set whose `__getitems__` gives whole batches.
        sampler: Which slots make a batch.
        num_workers: Processes that load; 0 loads in this one.
        pin_memory: Whether to put batches where an accelerator copies them from faster.
    """
    loader = DataLoader(
        views,
        batch_sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # without it the global one is drawn from, and a resumed run would differ
    )
    return iter(loader)


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    """`__getitems__` gives whole batches already. A lambda would not travel to spawned workers."""
    return batch


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
        source: A folder of images (with subfolders); webdataset tars as a path, a folder of them, a glob or a brace
            range; a `datasets` folder (`save_to_disk` or Parquet) or a data set of the Hub.
        preprocessing: How each image is prepared.
        split: Split of a `datasets` set.
        image_column: Column of images of a `datasets` set.
        config_name: Configuration of a `datasets` set.
        in_memory: Whether to prepare all images now and keep them in memory: for small sets.
        max_unreadable: Largest tolerated fraction of unreadable images.
        local_files_only: Do not look for a name that is not here on the Hub.

    Returns:
        A data set of `{"key": str, "image": float32 (C, size, size) in [0, 1]}`.

    Raises:
        FileNotFoundError: If there is no such source, or no image in it.
        ValueError: If the source is of another kind, or too many images cannot be read.
    """
    opened = open_store(source, split, image_column, config_name, local_files_only)
    return ImageDataset(opened, preprocessing, in_memory, max_unreadable)


def to_float(array: np.ndarray) -> Tensor:
    """uint8 `(H, W)` or `(H, W, 3)` -> float32 `(1, H, W)` or `(3, H, W)` in [0, 1]."""
    tensor = torch.from_numpy(array)
    tensor = tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)
    return tensor.float().div_(255)


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples of an `ImageDataset` -> `key` (list) and `image` `(B, C, H, W)`; C is 3 if any of them is colour."""
    images = [sample["image"] for sample in samples]
    channels = max(len(image) for image in images)
    stacked = torch.stack([image.expand(channels, -1, -1) for image in images])
    return {"key": [sample["key"] for sample in samples], "image": stacked}
