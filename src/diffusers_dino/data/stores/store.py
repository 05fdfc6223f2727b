"""Where images are kept: a folder, webdataset tars, or a Hugging Face data set, behind one small interface."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from ..images.reading import IMAGE_EXTENSIONS, UnreadableImageError, as_image, is_unnamed_dicom, read_image
from .archives import split_name
from .remote import is_remote
from .shards import MANIFEST, ShardStore

__all__ = ["FolderStore", "HuggingFaceStore", "ImageStore", "open_store"]


class ImageStore(Protocol):
    """A numbered collection of images.

    Attributes:
        keys: One name for each sample, in order; the key of its random draws and of its companions.
        shard_sizes: Samples in each part that is best read together; they follow each other.
        lost: By number, why a sample is known to be gone without trying to read it.
        prepared_by: Fingerprint of the `Preprocessing` that the images have been through; None if of none or unknown.
    """

    keys: Sequence[str]
    lost: Mapping[int, str] = MappingProxyType({})
    prepared_by: str | None = None

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Samples in each shard; what has no shards is one."""
        return [len(self.keys)]

    def describe(self, index: int) -> str:
        """What to call a sample in a message."""

    def read(self, index: int) -> np.ndarray:
        """The pixels as `read_image` gives them; raises `UnreadableImageError`."""

    def read_many(
        self, indices: Sequence[int], out: Sequence[np.ndarray] | None = None
    ) -> Iterator[np.ndarray | UnreadableImageError]:
        """The pixels of several samples, or the reason of each that cannot be read.

        `out` is memory for each, which `read_image` may decode to.
        """
        return map(self._try_to_read, indices)

    def companion(self, index: int, extension: str) -> bytes:
        """The file beside the image with the same key, such as `"json"` or `"mask.png"`; raises `KeyError`."""

    def _try_to_read(self, index: int) -> np.ndarray | UnreadableImageError:
        try:
            return self.read(index)
        except UnreadableImageError as error:
            return error


class FolderStore(ImageStore):
    """All images below a folder, sorted by path. Masks (`KEY.mask.png`) are companions, not images.

    DICOM files are found also where they have no extension or are named by a UID.

    Args:
        root: The folder.

    Raises:
        FileNotFoundError: If there is no image in it.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        relative = sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())
        self._paths = [path for path in relative if _has_image_name(path) or is_unnamed_dicom(self.root / path)]
        if not self._paths:
            kinds = ", ".join(IMAGE_EXTENSIONS)
            raise FileNotFoundError(
                f"No image in {str(root)!r} nor in its folders. Looked for {kinds}, and tars of them."
            )
        keys = [_key(path) for path in self._paths]
        count = Counter(keys)  # `a.png` beside `a.jpg`: the extension keeps them apart
        self.keys = [path if count[key] > 1 else key for path, key in zip(self._paths, keys, strict=True)]

    def describe(self, index: int) -> str:
        return str(self.root / self._paths[index])

    def read(self, index: int) -> np.ndarray:
        return read_image(self.root / self._paths[index])

    def companion(self, index: int, extension: str) -> bytes:
        path = self.root / f"{_key(self._paths[index])}.{extension}"
        if not path.is_file():
            raise KeyError(f"{self.describe(index)} has no companion {path.name!r}")
        return path.read_bytes()


def _has_image_name(path: str) -> bool:
    return split_name(path)[1] in IMAGE_EXTENSIONS


def _key(path: str) -> str:
    """The name without its extension; all of it where what follows the last dot is part of a UID."""
    return split_name(path)[0] if _has_image_name(path) else path


class HuggingFaceStore(ImageStore):
    """A data set of the `datasets` library: an id on the Hub, a `save_to_disk` folder or a folder of Parquet files.

    Args:
        name: Hub id or folder.
        split: Which split to use.
        image_column: Name of the column of images.
        config_name: Name of the data set's configuration, if it has several.

    Raises:
        FileNotFoundError: If there is no such data set.
        ValueError: If it has no such split or column, or no sample.
        ImportError: If `datasets` is not installed.
    """

    def __init__(
        self, name: str | Path, split: str = "train", image_column: str = "image", config_name: str | None = None
    ) -> None:
        data = _load_hugging_face(str(name), split, config_name)
        if image_column not in data.column_names:
            columns = ", ".join(data.column_names)
            raise ValueError(f"{str(name)!r} has no column {image_column!r}, but {columns}. Choose with image_column.")
        if len(data) == 0:
            raise ValueError(f"Split {split!r} of {str(name)!r} is empty.")
        self._name = f"{name}[{split}]"
        self._data = data
        self._column = image_column
        self.keys = [f"{index:09d}" for index in range(len(data))]

    def describe(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def read(self, index: int) -> np.ndarray:
        value = self._data[index][self._column]
        if isinstance(value, dict):  # an undecoded Image: the reader here keeps 16-bit data, which Image's may not
            value = value.get("bytes") or value.get("path")
        if value is None:
            raise UnreadableImageError(f"Cannot read {self.describe(index)}: it holds no image")
        if not isinstance(value, np.ndarray | list):
            return read_image(value, self.describe(index))
        try:
            return as_image(np.asarray(value))
        except UnreadableImageError as error:
            raise UnreadableImageError(f"Cannot read {self.describe(index)}: {error}") from error

    def companion(self, index: int, extension: str) -> bytes:
        raise KeyError(f"{self.describe(index)} has no companion {extension!r}: a datasets set keeps columns instead")


def _load_hugging_face(name: str, split: str, config_name: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"Reading {name!r} needs the datasets library. Install it with `pip install diffusers-dino[train]`."
        ) from error
    folder = Path(name)
    try:
        saved = folder.is_dir() and any((folder / f).is_file() for f in ("dataset_info.json", "dataset_dict.json"))
        data = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config_name)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"{name!r} is no folder or shard here, and no data set that the Hub gave: {error}"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"{name!r} has no split {split!r}, but {', '.join(data)}.")
        data = data[split]
    for column, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
    return data


def open_store(
    source: str | Path,
    split: str = "train",
    image_column: str = "image",
    config_name: str | None = None,
    local_files_only: bool = False,
) -> ImageStore:
    """Find out what a source is and open it: see `open_images`."""
    text = str(source)
    if text.startswith("pipe:"):
        raise ValueError(f"{text!r} would run a command. Give a path or a URL instead.")
    if is_remote(text):
        return ShardStore(text, split)
    folder = Path(text)
    if folder.is_file() and folder.suffix != ".tar":
        raise ValueError(f"{text!r} is a file. Give a folder of images, .tar shards or a data set of the Hub.")
    if text.endswith(".tar"):
        return ShardStore(text)
    if not folder.is_dir():
        if local_files_only or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", text):
            raise FileNotFoundError(f"There is no folder {text!r}.")
        return HuggingFaceStore(text, split, image_column, config_name)
    if any((folder / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
        return HuggingFaceStore(text, split, image_column, config_name)
    if any(folder.glob("*.tar")) or (folder / MANIFEST).is_file():
        return ShardStore(text, split)
    if any(folder.rglob("*.parquet")):
        return HuggingFaceStore(text, split, image_column, config_name)
    return FolderStore(folder)
