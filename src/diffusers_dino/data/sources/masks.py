"""Images with segmentation masks: folders, shards, and data sets of the catalogue that have masks.

Image and mask are cut to the largest centred square and resized, masks by nearest neighbour. Where borders are to be
removed, they are found in the image, and cut off both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..datasets import to_float
from ..facts import facts_beside, patient_in
from ..images.errors import UnreadableImageError
from ..images.preprocessing import Preprocessing
from ..images.reading import IMAGE_EXTENSIONS, read_image
from ..keys import respell
from ..stores import ImageStore
from ..stores.archives import split_name
from ..stores.folder import FolderStore
from ..stores.shards import ShardStore
from ..stores.walk import list_files
from .records import Record

__all__ = ["MaskedImage", "MaskedImages", "open_masked_images", "to_mask", "unite_masks"]

_MASK = "mask.png"


@dataclass(frozen=True)
class MaskedImage:
    """One image `(1 or 3, size, size)` float32 in [0, 1] with its mask `(mask_size, mask_size)` bool."""

    key: str
    image: Tensor
    mask: Tensor


@dataclass(frozen=True)
class _Entry:
    key: str
    patient: str | None  # None if unknown
    read_image: Callable[[], np.ndarray]
    read_masks: Callable[[], list[tuple[str, np.ndarray]]]  # (name for messages, pixels)
    scaled: bool = False  # whether masks may be of another size than the image
    earlier: Preprocessing | None = None  # how the image was prepared before


class MaskedImages(Sequence[MaskedImage]):
    """Images with masks, read on access."""

    def __init__(self, entries: Iterable[_Entry], preprocessing: Preprocessing, mask_size: int) -> None:
        self._entries = list(entries)
        self.preprocessing, self.mask_size = preprocessing, mask_size

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return self.preprocessing.size

    @property
    def keys(self) -> list[str]:
        """The keys of the samples, in order."""
        return [entry.key for entry in self._entries]

    @property
    def patients(self) -> list[str]:
        """The patient of each sample; its key if unknown."""
        return [entry.patient or entry.key for entry in self._entries]

    @property
    def patients_known(self) -> bool:
        """Whether the patient of every sample is known."""
        return all(entry.patient is not None for entry in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> MaskedImage:  # type: ignore[override]
        """Read one sample; `UnreadableImageError` if a file is damaged, or a mask is none of this image."""
        entry = self._entries[index]
        pixels = entry.read_image()
        return MaskedImage(entry.key, self._image(entry, pixels), self._mask(entry, pixels))

    def image(self, index: int) -> Tensor:
        """Only the image of a sample, `(1 or 3, size, size)` in [0, 1]."""
        entry = self._entries[index]
        return self._image(entry, entry.read_image())

    def mask(self, index: int) -> Tensor:
        """Only the mask of a sample, `(mask_size, mask_size)` bool, checked against its image's size."""
        entry = self._entries[index]
        return self._mask(entry, entry.read_image())

    def resized(self, size: int) -> MaskedImages:
        """The same samples with images of another size."""
        return MaskedImages(self._entries, replace(self.preprocessing, size=size), self.mask_size)

    def select(self, keys: Sequence[str]) -> MaskedImages:
        """The samples of these keys, in their order; raises `KeyError` if one is missing."""
        entries = {entry.key: entry for entry in self._entries}
        return MaskedImages([entries[key] for key in keys], self.preprocessing, self.mask_size)

    def _image(self, entry: _Entry, pixels: np.ndarray) -> Tensor:
        return to_float(self.preprocessing(pixels, entry.earlier))

    def _mask(self, entry: _Entry, pixels: np.ndarray) -> Tensor:
        mask = unite_masks(entry.read_masks(), pixels.shape[:2], entry.scaled)
        window = self.preprocessing.window(pixels, entry.earlier)
        return torch.from_numpy(replace(self.preprocessing, size=self.mask_size).prepare_mask(mask, window))


def open_masked_images(
    source: str | Path | Iterable[Record],
    size: int,
    mask_size: int = 256,
    max_samples: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> MaskedImages:
    """Open images with masks.

    Args:
        source: A folder with `images` and `masks`, where a mask has the name of its image, with or without `_mask`;
            a folder of `KEY.png` beside `KEY.mask.png`; webdataset tars of such pairs; or the records of a data set
            of the catalogue, whose masks, such as those of the left and the right lung, are united.
        size, mask_size: Sides of the images and of the masks in pixels.
        max_samples: Use only the first ones.
        preprocessing: How images are prepared, at any size; by default their borders stay on.

    `FileNotFoundError` if there is no folder, no image or no mask of an image; `ValueError` if no record has a mask.
    """
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, got {max_samples}.")
    if not isinstance(source, str | Path):
        entries = _from_records(source)
    elif Path(source).is_dir() and (Path(source) / "images").is_dir():
        entries = _from_two_folders(Path(source) / "images", Path(source) / "masks")
    else:
        entries = _from_companions(source)
    preprocessing = replace(preprocessing or Preprocessing(remove_borders=False), size=size)
    return MaskedImages(entries[:max_samples], preprocessing, mask_size)


def unite_masks(masks: Iterable[tuple[str, np.ndarray]], shape: tuple[int, ...], scaled: bool = True) -> np.ndarray:
    """The union `(H, W)` bool of the masks of an image of this shape, each with a name for messages.

    A mask is what `to_mask` takes; of one with colours the brightest counts. With `scaled`, it may be of another size
    in the same proportions, as JSRT's are; the nearest of its pixels counts. `UnreadableImageError` otherwise.
    """
    height, width = shape
    union = np.zeros((height, width), bool)
    for name, values in masks:
        values = values.max(axis=2) if values.ndim == 3 else values
        tall, wide = values.shape
        if values.shape != union.shape and not (scaled and tall * width == wide * height):
            raise UnreadableImageError(
                f"{name} is {wide} x {tall} pixels, but its image is {width} x {height}: a mask has its image's size"
            )
        part = Image.fromarray(to_mask(values, name).numpy().astype(np.uint8))
        union |= np.asarray(part.resize((width, height), Image.Resampling.NEAREST)).astype(bool)
    return union


def to_mask(values: Any, name: str = "mask") -> Tensor:
    """Check that an array or tensor is a mask, and make it one: `(..., H, W)` bool.

    It has at most two values, of which the smaller one is background. A single value is background if it is 0 and
    foreground if it is 1 or 255. Anything else raises `UnreadableImageError`, with `name` in the message.
    """
    values = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    if values.ndim < 2 or values.numel() == 0:
        raise UnreadableImageError(f"{name}: a mask is (H, W), got {tuple(values.shape)}")
    if values.dtype == torch.bool:
        return values
    found = values.unique()
    if values.is_floating_point() and not torch.isfinite(found).all():
        raise UnreadableImageError(f"{name}: the mask has values that are not finite")
    if len(found) > 2:
        raise UnreadableImageError(
            f"{name}: a mask has two values, this one has {len(found)}. Save masks without loss, as PNG, one "
            "structure in each, and resize them by nearest neighbours"
        )
    if len(found) == 1 and found.item() not in (0, 1, 255):
        raise UnreadableImageError(
            f"{name}: its only value is {found.item():g}: is it background (0) or foreground (1 or 255)?"
        )
    return values == found[-1] if len(found) == 2 else values != 0


def _from_records(records: Iterable[Record]) -> list[_Entry]:
    records = [record for record in records if record.masks]
    if not records:
        raise ValueError("None of the records has a mask. Those of JSRT, Montgomery and Shenzhen are extra downloads.")
    missing = [path for record in records for path in record.masks if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} masks are missing, such as {missing[0]}.")
    return [
        _Entry(
            record.image_id,
            respell(record.patient) if record.names_patient else None,
            partial(read_image, record.image, raw=record.raw, inverted=record.invert),
            partial(_read_all, record.masks),
            scaled=True,
        )
        for record in records
    ]


def _from_two_folders(images: Path, masks: Path) -> list[_Entry]:
    if not masks.is_dir():
        raise FileNotFoundError(f"There are images in {images}, but no folder {masks} of masks.")
    parts = ((path, *split_name(path)) for path in list_files(masks).files)
    by_name = {key: masks / path for path, key, kind in parts if kind.removeprefix("mask.") in IMAGE_EXTENSIONS}
    store = FolderStore(images)
    entries = []
    for index, key in enumerate(store.keys):
        path = by_name.get(key) or by_name.get(f"{key}_mask")
        if path is None:
            raise FileNotFoundError(
                f"{store.describe(index)} has no mask: expected {masks / key}.png or {masks / key}_mask.png."
            )
        entries.append(_Entry(key, None, partial(store.read, index), partial(_read_all, (path,))))
    return entries


def _from_companions(source: str | Path) -> list[_Entry]:
    is_shards = str(source).endswith(".tar") or (Path(source).is_dir() and any(Path(source).glob("*.tar")))
    if not is_shards and not Path(source).is_dir():
        raise FileNotFoundError(f"There is no folder {str(source)!r} of images and masks.")
    store = ShardStore(source) if is_shards else FolderStore(source)

    def read_companion(index: int) -> list[tuple[str, np.ndarray]]:
        name = f"{store.describe(index)} ({_MASK})"
        try:
            return [(name, read_image(store.companion(index, _MASK), name))]
        except KeyError as error:
            raise FileNotFoundError(f"{store.describe(index)} has no mask: expected KEY.{_MASK} beside it.") from error

    read_companion(0)  # a folder without masks is an error now, not after the first hour
    patients = [_stored_patient(store, index) for index in range(len(store.keys))]
    if None not in patients and len(set(patients)) == len(patients):
        patients = list(store.keys)  # one image each: halves of them are then those of older versions
    return [
        _Entry(key, patient, partial(store.read, index), partial(read_companion, index), earlier=store.prepared_by)
        for index, (key, patient) in enumerate(zip(store.keys, patients, strict=True))
    ]


def _stored_patient(store: ImageStore, index: int) -> str | None:
    """The patient in `KEY.json` beside an image, as shards have it."""
    try:
        return patient_in(facts_beside(store, index))
    except (KeyError, ValueError):
        return None


def _read_all(paths: Sequence[Path]) -> list[tuple[str, np.ndarray]]:
    return [(str(path), read_image(path)) for path in paths]
