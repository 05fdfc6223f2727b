"""Where images are kept: a folder, webdataset tars, or a Hugging Face data set, behind one small interface."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ..images.reading import IMAGE_EXTENSIONS
from .filesystem import expand_braces, is_pattern
from .folder import FolderStore, find_images
from .hugging_face import SAVED, HuggingFaceStore
from .remote import is_remote
from .shard_list import MANIFEST, is_shard_manifest
from .shards import ShardStore
from .store import ImageStore
from .walk import list_files, printable

__all__ = ["FolderStore", "HuggingFaceStore", "ImageStore", "ShardStore", "open_store"]

logger = logging.getLogger(__name__)


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
    folder = Path(text)
    if is_remote(text):
        return ShardStore(text, split, image_column)
    if folder.is_dir():
        return _open_folder(folder, split, image_column, config_name)
    if text.endswith(".tar"):
        return ShardStore(text, None, image_column)
    if text.endswith(".parquet") and (folder.is_file() or is_pattern(text)):
        return HuggingFaceStore(text, split, image_column, config_name)
    if folder.is_file():
        raise ValueError(f"{text!r} is a file. Give a folder of images, .tar shards or a data set of the Hub.")
    endings = {Path(one).suffix[1:].lower() for one in expand_braces(text)} if is_pattern(text) else set()
    if endings and endings <= {*IMAGE_EXTENSIONS, ""}:
        root = next(parent for parent in folder.parents if parent.is_dir())
        pattern = folder.relative_to(root).as_posix()
        if not is_pattern(pattern.partition("/")[0]) and "{" not in pattern.partition("/")[0]:
            raise FileNotFoundError(f"There is no folder {str(root / pattern.partition('/')[0])!r}.")
        return FolderStore(root, pattern)
    if local_files_only or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", text):
        raise FileNotFoundError(f"There is no folder {text!r}.")
    return HuggingFaceStore(text, split, image_column, config_name)


def _open_folder(folder: Path, split: str, image_column: str, config_name: str | None) -> ImageStore:
    """A folder holds images, tars or a data set: what holds several of them is not guessed at."""
    listing = list_files(folder)
    tars, tables = ([path for path in listing.files if path.lower().endswith(end)] for end in (".tar", ".parquet"))
    saved = any(name in listing.files for name in SAVED)
    if not (tars or tables or saved or MANIFEST in listing.files):
        return FolderStore(folder, listing=listing)
    images = len(find_images(folder, listing))
    for clause in listing.counts():  # a shard may be a link to what has not been fetched
        logger.warning("%s: left out: %s", printable(str(folder)), clause)
    if is_shard_manifest(folder / MANIFEST) or (MANIFEST in listing.files and not images):
        if images:
            logger.warning("%s: its %s names shards. %d images beside them are not read", folder, MANIFEST, images)
        return ShardStore(folder, split, image_column)
    kinds = {"images": images, "tar files": len(tars), "Parquet files": len(tables), "a saved data set": int(saved)}
    found = [kind if kind.startswith("a ") else f"{count} {kind}" for kind, count in kinds.items() if count]
    if len(found) > 1:
        raise ValueError(
            f"{str(folder)!r} holds {' and '.join(found)}: which are meant? Give the folder below it that holds only "
            f"these, or a pattern such as '{folder}/*.png', '{folder}/*.tar' or '{folder}/**/*.parquet'."
        )
    if images:
        return FolderStore(folder, listing=listing)
    if tars:
        return ShardStore(folder, split, image_column)
    return HuggingFaceStore(folder, split, image_column, config_name)
