"""Features of a collection of images: computed, kept in files with their keys and description, and compared."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from ..data import ImageDataset, Slot, TrainingViews, load_batches
from ..data.keys import find_keys
from ..tensor_files import read_tensors, refusing, write_tensors
from .extractors import FeatureExtractor, FeatureSpec

__all__ = ["FeatureSet", "Features", "comparable", "extract_features", "feature_matrix", "iterate_features"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureSet:
    """Features of N images: `(N, D)` float32, finite, with the images' keys and how they were computed.

    ValueError if the three do not fit together, or a feature is not finite.
    """

    features: Tensor
    keys: tuple[str, ...]
    spec: FeatureSpec

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", tuple(self.keys))
        expected = (len(self.keys), self.spec.dim)
        if tuple(self.features.shape) != expected:
            raise ValueError(
                f"{len(self.keys)} keys and features of {self.spec.dim} dimensions ask for a tensor {expected}, got "
                f"{tuple(self.features.shape)}."
            )
        if not self.features.is_floating_point() or not torch.isfinite(self.features).all():
            raise ValueError("Features are floating numbers, none of them NaN or infinite.")

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, keys: Sequence[str]) -> FeatureSet:
        """The features of these images, in the order of `keys`; KeyError if one is not in the set."""
        rows = find_keys(keys, self.keys, "keys have no features")
        return FeatureSet(self.features[rows], tuple(keys), self.spec)

    def save(self, path: str | Path) -> None:
        """Write one `.safetensors` file, whole or not at all; the same set gives the same bytes."""
        keys = torch.frombuffer(bytearray(json.dumps(self.keys).encode()), dtype=torch.uint8)
        write_tensors(path, {"features": self.features.float(), "keys": keys}, {"spec": self.spec.to_dict()})

    @classmethod
    def load(cls, path: str | Path) -> FeatureSet:
        """Read what `save` wrote; ValueError if it is another kind of file, damaged, or was edited."""
        tensors, description = read_tensors(path, "a file of features", "features", "keys")
        with refusing(path, "a file of features"):
            keys = json.loads(tensors["keys"].numpy().tobytes())
            if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
                raise ValueError("its keys are not a list of texts")
            return cls(tensors["features"], tuple(keys), FeatureSpec.from_dict(description["spec"]))


Features: TypeAlias = Tensor | FeatureSet


def feature_matrix(features: Features, name: str = "features", at_least: int = 2) -> Tensor:
    """Features `(N, D)` on the CPU, in the type that they came in; ValueError if too few or not finite."""
    matrix = features.features if isinstance(features, FeatureSet) else features
    if not isinstance(matrix, Tensor) or matrix.ndim != 2 or len(matrix) < at_least or not matrix.shape[1]:
        found = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(f"`{name}` must be a tensor (N, D) with N >= {at_least}, got {found}.")
    if not torch.isfinite(matrix).all():
        raise ValueError(f"`{name}` holds NaN or infinite values.")
    return matrix.detach().cpu()  # float64 is not to be had on every device


def comparable(features: Features, reference: Features, at_least: int = 2) -> tuple[Tensor, Tensor]:
    """Both sets by `feature_matrix`; ValueError also if they are of different extractors or widths."""
    if isinstance(features, FeatureSet) and isinstance(reference, FeatureSet):
        features.spec.require_same(reference.spec)
    pair = feature_matrix(features, "features", at_least), feature_matrix(reference, "reference", at_least)
    if pair[0].shape[1] != pair[1].shape[1]:
        raise ValueError(f"Features of {pair[0].shape[1]} and of {pair[1].shape[1]} dimensions do not compare.")
    return pair


def extract_features(
    extractor: FeatureExtractor,
    images: ImageDataset | Tensor,
    batch_size: int = 64,
    *,
    keys: Sequence[str] | None = None,
    num_workers: int = 0,
    progress: bool = False,
) -> FeatureSet:
    """Features of all images but those that cannot be read, in order; a batch at a time is in memory.

    Args:
        extractor: What computes them, and refuses them by a ValueError.
        images: A data set (see `data.open_images`), or `(N, C, H, H)` in [0, 1].
        batch_size: Images computed at once.
        keys: Of a tensor's images, one an image; by default their numbers.
        num_workers: Processes that load a data set.
        progress: Whether to show a bar.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    bar = partial(tqdm, total=-(-len(images) // batch_size), unit="batch", leave=False, disable=not progress)
    if isinstance(images, Tensor):
        names = [str(i) for i in range(len(images))] if keys is None else list(keys)
        if len(names) != len(images):
            raise ValueError(f"Give one key an image: {len(names)} keys for {len(images)} images.")
        parts = [extractor(images[first : first + batch_size]) for first in bar(range(0, len(images), batch_size))]
    elif keys is not None:
        raise ValueError("A data set has its own keys: choose among them with its `select`.")
    else:
        pieces = list(bar(iterate_features(extractor, images, batch_size, num_workers)))
        parts, names = [part for part, _ in pieces], [key for _, keys in pieces for key in keys]
    features = torch.cat([torch.empty(0, extractor.spec.dim), *parts])
    return FeatureSet(features, tuple(names), extractor.spec)


def iterate_features(
    extractor: FeatureExtractor, images: ImageDataset, batch_size: int = 64, num_workers: int = 0
) -> Iterator[tuple[Tensor, list[str]]]:
    """As `extract_features`, but yields features `(n, D)` and keys of a batch: for statistics of large sets."""
    wanted = images.keys
    blocks = [
        [Slot(0, 0, index) for index in range(first, min(first + batch_size, len(wanted)))]
        for first in range(0, len(wanted), batch_size)
    ]
    views = TrainingViews(images, None)  # the images as they are
    for block, batch in zip(blocks, load_batches(views, blocks, num_workers, extractor.device), strict=True):
        # another image stands in for one that cannot be read, but must not count twice
        own = [row for row, slot in enumerate(block) if batch["key"][row] == wanted[slot.index]]
        if len(own) < len(block):
            logger.warning("%d images cannot be read and have no features.", len(block) - len(own))
        yield extractor(batch["image"][own]), [batch["key"][row] for row in own]
