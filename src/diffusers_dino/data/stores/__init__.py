"""Where images are kept: a folder, webdataset tars, or a Hugging Face data set, behind one small interface."""

from __future__ import annotations

import re
from pathlib import Path

from .folder import FolderStore
from .hugging_face import HuggingFaceStore
from .remote import is_remote
from .shards import MANIFEST, ShardStore
from .store import ImageStore

__all__ = ["FolderStore", "HuggingFaceStore", "ImageStore", "ShardStore", "open_store"]


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
