"""Images in a data set of the `datasets` library."""

from __future__ import annotations

import glob
import itertools
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ...extras import require
from ...files import tolerate_missing_locks
from ..images.errors import UnreadableImageError
from ..images.reading import as_image, read_image
from .filesystem import LocalFileSystem, is_pattern
from .store import ImageStore
from .walk import list_files

__all__ = ["SAVED", "HuggingFaceStore"]

SAVED = ("dataset_info.json", "dataset_dict.json")  # either is in each folder that `save_to_disk` writes


class HuggingFaceStore(ImageStore):
    """A data set of the `datasets` library: an id on the Hub, a `save_to_disk` folder, or Parquet files.

    Images are in its rows, or in files below its folder: a row that names any other file is not followed. See
    `open_images` for the arguments and errors.
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
        self._data = data.select_columns([image_column])  # a row is read with all its columns
        self._folders = _folders_of(str(name))
        self._column = image_column
        self.keys = [f"{index:09d}" for index in range(len(data))]

    def describe(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def read(self, index: int) -> np.ndarray:
        value = self._value(index)
        try:
            if value is None:
                raise UnreadableImageError("it holds no image")
            if not isinstance(value, str | bytes):
                return as_image(np.asarray(value))
            value = value if isinstance(value, bytes) else self._find(value)
        except ValueError as error:  # NumPy's and the system's are among them
            raise UnreadableImageError(f"Cannot read {self.describe(index)}: {error}") from error
        return read_image(value, self.describe(index))

    def mark(self, index: int) -> str:
        value = self._value(index)
        return str(zlib.crc32(value)) if isinstance(value, bytes) else ""

    def _value(self, index: int) -> Any:
        value = self._data[index][self._column]
        if isinstance(value, dict):  # an undecoded Image: the reader here keeps 16-bit data, which Image's may not
            value = value.get("bytes") or value.get("path")
        return value

    def _find(self, path: str) -> str:
        """The file that a row names, if it is in the data set's own folder."""
        for folder in self._folders:
            real = os.path.realpath(os.path.join(folder, path))
            if real.startswith(f"{folder}{os.sep}") and os.path.isfile(real):
                return real
        raise UnreadableImageError("it names a file that is not below the folder of the data set, or not a file")

    def companion(self, index: int, extension: str) -> bytes:
        raise KeyError(f"{self.describe(index)} has no companion {extension!r}: a datasets set keeps columns instead")


def _folders_of(name: str) -> list[str]:
    """Where the files of a data set are: its folder, or those into which the Hub's libraries download it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    path = Path(name)
    if path.is_dir():
        return [os.path.realpath(path)]
    if name.endswith(".parquet"):
        return [os.path.realpath(next(parent for parent in path.parents if parent.is_dir()))]
    import datasets

    repository = os.path.join(HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}")
    return [os.path.realpath(folder) for folder in (repository, datasets.config.DOWNLOADED_DATASETS_PATH)]


def _load_hugging_face(name: str, split: str, config_name: str | None) -> Any:
    datasets = require("datasets", "train", f"Reading {name!r} needs the datasets library")
    folder = Path(name)
    try:
        with tolerate_missing_locks():
            if folder.is_dir() and any((folder / file).is_file() for file in SAVED):
                data = datasets.load_from_disk(name)
            elif name.endswith(".parquet"):
                data = datasets.load_dataset("parquet", data_files={split: _escaped(LocalFileSystem().glob(name))})
            elif folder.is_dir() and is_pattern(str(folder.resolve())):  # `datasets` would look for what it matches
                files = [f"{folder}/{path}" for path in list_files(folder).files if path.endswith(".parquet")]
                by_split = itertools.groupby(sorted(files, key=_split_of), _split_of)
                data = datasets.load_dataset("parquet", data_files={name: _escaped(some) for name, some in by_split})
            else:
                data = datasets.load_dataset(name, config_name)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"{name!r} is neither a folder or a shard here nor a data set that the Hub gave: {error}"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"{name!r} has no split {split!r}, but {', '.join(data)}.")
        data = data[split]
    for column, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
    return data


def _escaped(paths: Iterable[str]) -> list[str]:
    return [glob.escape(os.path.abspath(path)) for path in paths]


def _split_of(path: str) -> str:
    """The split that the name of a Parquet file tells."""
    words = re.split(r"[^a-z]+", Path(path).name.lower())
    names = {"validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing", "eval", "evaluation")}
    return next((split for split, known in names.items() if set(words) & set(known)), "train")
