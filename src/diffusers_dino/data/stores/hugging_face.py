"""Images in a data set of the `datasets` library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...extras import require
from ..images.errors import UnreadableImageError
from ..images.reading import as_image, read_image
from .store import ImageStore

__all__ = ["HuggingFaceStore"]


class HuggingFaceStore(ImageStore):
    """A data set of the `datasets` library: an id on the Hub, a `save_to_disk` folder or a folder of Parquet files.

    See `open_images` for the arguments and errors.
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
    datasets = require("datasets", "train", f"Reading {name!r} needs the datasets library")
    folder = Path(name)
    try:
        saved = folder.is_dir() and any((folder / f).is_file() for f in ("dataset_info.json", "dataset_dict.json"))
        data = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config_name)
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
