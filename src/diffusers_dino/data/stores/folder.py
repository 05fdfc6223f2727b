"""Images in a folder and the folders below it."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from ...files import mark_of
from ..images.reading import IMAGE_EXTENSIONS, is_image_file, read_image
from .archives import COMPANIONS, INDEX_SUFFIX, parent_of, split_name
from .filesystem import expand_braces
from .store import ImageStore
from .walk import FolderFiles, list_files, printable

__all__ = ["FolderStore", "find_images", "image_key"]

logger = logging.getLogger(__name__)


class FolderStore(ImageStore):
    """All images below a folder, sorted by path: files with an extension of images, and DICOM files of any other name.

    `KEY.mask.png`, and any `KEY.word.png` beside an image `KEY.png`, are companions, not images. What `list_files`
    leaves out is counted in a warning.

    Args:
        root: The folder.
        pattern: Which images, such as `**/*.{png,jpg}`; by default all. Companions that it names are images.
        show_names: Whether the warning gives examples; names of folders may be names of patients.

    Attributes:
        paths: The files of the images, below `root`.
        left_out: By reason, the files and folders that are not looked at.
    """

    def __init__(
        self,
        root: str | Path,
        pattern: str | None = None,
        show_names: bool = True,
        listing: FolderFiles | None = None,
    ) -> None:
        self.root = Path(root)
        listing = listing or list_files(root)
        self.left_out = listing.left_out
        images = find_images(root, listing, pattern)
        keys = set(images.values())
        self._renamed: dict[str, str] = {}  # companions that are not named by key and extension
        for path in listing.files:
            key, extension = split_name(path)
            if path in images and images[path] == key and (found := parent_of(key, keys)) is not None:
                del images[path]
                listing.leave_out(COMPANIONS, path)
                key, extension = found[0], f"{found[1]}.{extension}".lower()
            if path not in images:
                key = next((one for one in (key, f"{key}.image", f"{key}.img") if one in keys), key)
            if path not in images and path != f"{key}.{extension}":
                self._renamed.setdefault(f"{key}.{extension}", path)
        self.paths = list(images)
        clauses = listing.counts(3 if show_names else 0)
        for clause in clauses:
            logger.warning("%s: left out: %s", self._show() if show_names else "A folder", clause)
        if not self.paths:
            kinds = ", ".join(IMAGE_EXTENSIONS)
            left = "".join(f" {clause}." for clause in clauses)
            where = f"{str(root)!r} or its folders" if pattern is None else repr(f"{root}/{pattern}")
            raise FileNotFoundError(f"No image in {where}. Looked for {kinds}, and tars of them.{left}")
        count = Counter(images.values())  # `a.png` beside `a.jpg`: the extension keeps them apart
        self.keys = [printable(path if count[key] > 1 else key) for path, key in images.items()]

    def describe(self, index: int) -> str:
        return f"{self._show()}/{printable(self.paths[index])}"

    def read(self, index: int) -> np.ndarray:
        return read_image(self.root / self.paths[index], self.describe(index))

    def mark(self, index: int) -> str:
        return mark_of([self.root / self.paths[index]])

    def companion_path(self, index: int, extension: str) -> Path | None:
        """The file beside an image with the same key, such as its `"mask.png"` (or `mask.PNG`); None without one."""
        name = f"{image_key(self.paths[index])}.{extension}"
        path = self.root / self._renamed.get(name, name)
        return path if path.is_file() else None

    def companion(self, index: int, extension: str) -> bytes:
        path = self.companion_path(index, extension)
        if path is None:
            raise KeyError(f"{self.describe(index)} has no companion {extension!r}")
        return path.read_bytes()

    def _show(self) -> str:
        return printable(str(self.root))


def find_images(root: str | Path, listing: FolderFiles, pattern: str | None = None) -> dict[str, str]:
    """The images among the files of a folder, also those that accompany others: their keys by path."""
    images: dict[str, str] = {}
    wanted = [_to_expression(one) for one in expand_braces(pattern)] if pattern else []
    for path in listing.files:
        if pattern and not any(expression.fullmatch(path) for expression in wanted):
            continue
        key, extension = split_name(path)
        if path.endswith(INDEX_SUFFIX) or (extension.startswith("mask.") and not pattern):
            continue
        try:
            if extension in IMAGE_EXTENSIONS:
                images[path] = key
            elif is_image_file(os.path.join(root, path)):
                images[path] = path
        except OSError as error:
            listing.leave_out(f"files that cannot be opened ({error.strerror})", path)
    return images


def _to_expression(pattern: str) -> re.Pattern[str]:
    """A pattern of a shell, in which `**/` stands for any folders, and `**` for all that is in them."""
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/?|\*|\?|\[[^]]+\])", pattern)
    return re.compile(
        "".join(signs.get(p) or (p.replace("[!", "[^") if p[:1] == "[" else re.escape(p)) for p in parts)
    )


def image_key(name: str) -> str:
    """A file's name without an image's extension; all of it if it has none, as with a DICOM UID."""
    key, extension = split_name(name)
    return key if extension in IMAGE_EXTENSIONS else name
