"""The interface of every store of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from ..images.errors import UnreadableImageError
from ..images.preprocessing import Preprocessing

__all__ = ["ImageStore"]


class ImageStore(ABC):
    """A numbered collection of images.

    Attributes:
        keys: One name for each sample, in order; the key of its random draws and of its companions.
        lost: By number, why a sample is known to be gone before it is read.
        prepared_by: The `Preprocessing` that the images have been through; None if unknown.
    """

    keys: Sequence[str]
    lost: Mapping[int, str] = MappingProxyType({})
    prepared_by: Preprocessing | None = None

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Samples in each shard, a part that is best read together; shards follow each other. By default one shard."""
        return [len(self.keys)]

    @abstractmethod
    def describe(self, index: int) -> str:
        """What to call a sample in a message."""

    @abstractmethod
    def read(self, index: int) -> np.ndarray:
        """The pixels as `read_image` gives them; raises `UnreadableImageError`."""

    @abstractmethod
    def companion(self, index: int, extension: str) -> bytes:
        """The file beside the image with the same key, such as `"json"` or `"mask.png"`; raises `KeyError`."""

    def mark(self, index: int) -> str:
        """What changes when a sample's file is another one, as far as a little reading tells; empty if it does not."""
        return ""

    def read_many(self, indices: Sequence[int]) -> Iterator[np.ndarray | UnreadableImageError]:
        """The pixels of several samples; for each that cannot be read, the error that says why."""
        for index in indices:
            try:
                yield self.read(index)
            except UnreadableImageError as error:
                yield error
