"""Where images are kept: a folder, local webdataset tars, or a Hugging Face data set, behind one small interface."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .archives import Member, expand_shards, index_tar, split_name
from .reading import IMAGE_EXTENSIONS, UnreadableImageError, read_image

__all__ = ["FolderStore", "HuggingFaceStore", "ImageStore", "ShardStore", "open_store"]


logger = logging.getLogger(__name__)


class ImageStore(Protocol):
    """A numbered collection of images.

    Attributes:
        keys: One name for each sample, in order; the key of its random draws and of its companions.
    """

    keys: list[str]

    def describe(self, index: int) -> str:
        """What to call a sample in a message."""

    def read(self, index: int) -> np.ndarray:
        """The pixels as `read_image` gives them; raises `UnreadableImageError`."""

    def companion(self, index: int, extension: str) -> bytes:
        """The file beside the image with the same key, such as `"json"` or `"mask.png"`; raises `KeyError`."""


class FolderStore:
    """All images below a folder, sorted by path. Masks (`KEY.mask.png`) are companions, not images.

    Args:
        root: The folder.

    Raises:
        FileNotFoundError: If there is no image in it.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        relative = sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())
        self._paths = [path for path in relative if split_name(path)[1] in IMAGE_EXTENSIONS]
        if not self._paths:
            kinds = ", ".join(IMAGE_EXTENSIONS)
            raise FileNotFoundError(
                f"No image in {str(root)!r} nor in its folders. Looked for {kinds}, and tars of them."
            )
        keys = [split_name(path)[0] for path in self._paths]
        count = Counter(keys)  # `a.png` beside `a.jpg`: the extension keeps them apart
        self.keys = [path if count[key] > 1 else key for path, key in zip(self._paths, keys, strict=True)]

    def describe(self, index: int) -> str:
        return str(self.root / self._paths[index])

    def read(self, index: int) -> np.ndarray:
        return read_image(self.root / self._paths[index])

    def companion(self, index: int, extension: str) -> bytes:
        path = self.root / f"{split_name(self._paths[index])[0]}.{extension}"
        if not path.is_file():
            raise KeyError(f"{self.describe(index)} has no companion {path.name!r}")
        return path.read_bytes()


class ShardStore:
    """The images in local webdataset tars, in the order of the shards and of their members.

    Args:
        pattern: A tar, a folder of tars, a glob or a brace range (`cxr-{000000..000009}.tar`).

    Raises:
        FileNotFoundError: If nothing matches, or no shard holds an image.
        ValueError: If a file is no tar.
    """

    def __init__(self, pattern: str | Path) -> None:
        self.shards = expand_shards(str(pattern))
        samples = [sample for shard in self.shards for sample in _index_shard(shard)]
        if not samples:
            raise FileNotFoundError(f"No image in the {len(self.shards)} shard(s) of {str(pattern)!r}.")
        self.keys = [key for key, _, _ in samples]
        self._files = [(shard, files) for _, shard, files in samples]

    def describe(self, index: int) -> str:
        shard, files = self._files[index]
        return f"{shard}:{_image_member(files).name}"

    def read(self, index: int) -> np.ndarray:
        shard, files = self._files[index]
        return read_image(_read_member(shard, _image_member(files)), self.describe(index))

    def companion(self, index: int, extension: str) -> bytes:
        shard, files = self._files[index]
        if extension not in files:
            raise KeyError(f"{self.describe(index)} has no companion {extension!r}, but {', '.join(files)}")
        return _read_member(shard, files[extension])


def _index_shard(path: str) -> list[tuple[str, str, dict[str, Member]]]:
    with open(path, "rb") as file:
        index = index_tar(file, path, Path(path).stat().st_size)
    samples = [(key, path, index.files(number)) for number, key in enumerate(index.keys)]
    samples = [sample for sample in samples if _image_member(sample[2])]
    if index.damage:
        logger.warning("Shard %s %s: %d samples of it are used, others are lost", path, index.damage, len(samples))
    return samples


def _image_member(files: dict[str, Member]) -> Member | None:
    return next((files[extension] for extension in IMAGE_EXTENSIONS if extension in files), None)


def _read_member(shard: str, member: Member) -> bytes:
    with open(shard, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


class HuggingFaceStore:
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
        return np.asarray(value) if isinstance(value, np.ndarray | list) else read_image(value, self.describe(index))

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
        raise ValueError(f"{text!r} would run a command. Give a path instead.")
    if "://" in text:
        raise ValueError(f"{text!r} is remote. Only local files and data sets of the Hub are read; download it first.")
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
    if any(folder.glob("*.tar")):
        return ShardStore(text)
    if any(folder.rglob("*.parquet")):
        return HuggingFaceStore(text, split, image_column, config_name)
    return FolderStore(folder)
