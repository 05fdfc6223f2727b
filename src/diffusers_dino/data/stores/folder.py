"""Images in a folder and the folders below it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from ..images.reading import IMAGE_EXTENSIONS, is_unnamed_dicom, read_image
from .archives import split_name
from .store import ImageStore

__all__ = ["FolderStore", "image_key"]


class FolderStore(ImageStore):
    """All images below a folder, sorted by path. Masks (`KEY.mask.png`) are companions, not images.

    DICOM files are also found if they have no extension or are named by a UID.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        relative = sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())
        self._paths = [path for path in relative if image_key(path) != path or is_unnamed_dicom(self.root / path)]
        if not self._paths:
            kinds = ", ".join(IMAGE_EXTENSIONS)
            raise FileNotFoundError(f"No image in {str(root)!r} or its folders. Looked for {kinds}, and tars of them.")
        keys = [image_key(path) for path in self._paths]
        count = Counter(keys)  # `a.png` beside `a.jpg`: the extension keeps them apart
        self.keys = [path if count[key] > 1 else key for path, key in zip(self._paths, keys, strict=True)]

    def describe(self, index: int) -> str:
        return str(self.root / self._paths[index])

    def read(self, index: int) -> np.ndarray:
        return read_image(self.root / self._paths[index])

    def companion(self, index: int, extension: str) -> bytes:
        path = self.root / f"{image_key(self._paths[index])}.{extension}"
        if not path.is_file():
            raise KeyError(f"{self.describe(index)} has no companion {path.name!r}")
        return path.read_bytes()


def image_key(name: str) -> str:
    """A file's name without an image's extension; all of it if it has none, as with a DICOM UID."""
    key, extension = split_name(name)
    return key if extension in IMAGE_EXTENSIONS else name
