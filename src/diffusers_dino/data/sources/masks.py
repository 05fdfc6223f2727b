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
from ..images.preprocessing import Preprocessing, border_window, center_crop
from ..images.reading import read_image
from ..stores import ImageStore
from ..stores.archives import split_name
from ..stores.folder import FolderStore
from ..stores.shards import ShardStore
from .records import Record

__all__ = ["MaskedImage", "MaskedImages", "open_masked_images", "to_mask"]

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


class MaskedImages(Sequence[MaskedImage]):
    """Images with masks, read on access."""

    def __init__(
        self, entries: Iterable[_Entry], preprocessing: Preprocessing, mask_size: int, max_scale: int = 1
    ) -> None:
        self._entries = list(entries)
        self.preprocessing, self.mask_size, self._max_scale = preprocessing, mask_size, max_scale

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
        """Read one sample; `UnreadableImageError` if a file is damaged, `ValueError` if the mask does not fit."""
        entry = self._entries[index]
        pixels = entry.read_image()
        return MaskedImage(entry.key, to_float(self.preprocessing(pixels)), self._mask(entry, pixels))

    def image(self, index: int) -> Tensor:
        """Only the image of a sample, `(1 or 3, size, size)` in [0, 1]."""
        return to_float(self.preprocessing(self._entries[index].read_image()))

    def mask(self, index: int) -> Tensor:
        """Only the mask of a sample, `(mask_size, mask_size)` bool, checked against its image's size."""
        entry = self._entries[index]
        return self._mask(entry, entry.read_image())

    def resized(self, size: int) -> MaskedImages:
        """The same samples with images of another size."""
        return MaskedImages(self._entries, replace(self.preprocessing, size=size), self.mask_size, self._max_scale)

    def select(self, keys: Sequence[str]) -> MaskedImages:
        """The samples of these keys, in their order; raises `KeyError` if one is missing."""
        entries = {entry.key: entry for entry in self._entries}
        return MaskedImages([entries[key] for key in keys], self.preprocessing, self.mask_size, self._max_scale)

    def _mask(self, entry: _Entry, image: np.ndarray) -> Tensor:
        united: np.ndarray | None = None
        image_shape = image.shape[:2]
        for name, pixels in entry.read_masks():
            size = pixels.shape[:2]
            if not any((size[0] * n, size[1] * n) == image_shape for n in range(1, self._max_scale + 1)):
                given, wanted = _size(size), _size(image_shape)
                raise ValueError(f"{name} is {given} pixels, but its image is {wanted}: a mask has its image's size.")
            part = to_mask(pixels if pixels.ndim == 2 else pixels.max(axis=2), name).numpy()
            if united is not None and part.shape != united.shape:
                raise ValueError(f"{name} is {_size(part.shape)}, the mask before it {_size(united.shape)}.")
            united = part if united is None else united | part
        if self.preprocessing.remove_borders:
            n = image_shape[0] // len(united)  # a mask may be smaller
            rows, columns = border_window(image, self.preprocessing.border_tolerance)
            united = united[rows.start // n : -(-rows.stop // n), columns.start // n : -(-columns.stop // n)]
        square = Image.fromarray(center_crop(united).astype(np.uint8))
        nearest = square.resize((self.mask_size, self.mask_size), Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(nearest)).bool()


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
    max_scale = 1
    if not isinstance(source, str | Path):
        entries, max_scale = _from_records(source), 2  # JSRT's masks are half the size of its images
    elif Path(source).is_dir() and (Path(source) / "images").is_dir():
        entries = _from_two_folders(Path(source) / "images", Path(source) / "masks")
    else:
        entries = _from_companions(source)
    preprocessing = replace(preprocessing or Preprocessing(remove_borders=False), size=size)
    return MaskedImages(entries[:max_samples], preprocessing, mask_size, max_scale)


def to_mask(values: Any, name: str = "mask") -> Tensor:
    """Check that an array or tensor is a mask, and make it one: `(..., H, W)` bool.

    It has at most two values, of which the smaller one is background. A single value is background if it is 0 and
    foreground if it is 1 or 255. Anything else raises `ValueError`, with `name` in the message.
    """
    values = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    if values.ndim < 2 or values.numel() == 0:
        raise ValueError(f"{name}: a mask is (H, W), got {tuple(values.shape)}.")
    if values.dtype == torch.bool:
        return values
    found = values.unique()
    if values.is_floating_point() and not torch.isfinite(found).all():
        raise ValueError(f"{name}: the mask has values that are not finite.")
    if len(found) > 2:
        shown = ", ".join(f"{value:g}" for value in found[:4].tolist())
        raise ValueError(
            f"{name}: a mask has two values, this one has {len(found)} ({shown}, ...). Save masks without loss, as "
            "PNG, one structure in each, and resize them by nearest neighbours."
        )
    if len(found) == 1 and found.item() not in (0, 1, 255):
        raise ValueError(f"{name}: its only value is {found.item():g}: is it background (0) or foreground (1 or 255)?")
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
            record.patient if record.names_patient else None,
            partial(read_image, record.image, raw=record.raw, inverted=record.invert),
            partial(_read_all, record.masks),
        )
        for record in records
    ]


def _from_two_folders(images: Path, masks: Path) -> list[_Entry]:
    if not masks.is_dir():
        raise FileNotFoundError(f"There are images in {images}, but no folder {masks} of masks.")
    by_name = {split_name(path.relative_to(masks).as_posix())[0]: path for path in sorted(masks.rglob("*.*"))}
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
        _Entry(key, patient, partial(store.read, index), partial(read_companion, index))
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


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"
