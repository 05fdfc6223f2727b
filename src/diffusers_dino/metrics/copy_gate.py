"""A gate that keeps near-copies of training images out of a synthetic set."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import ImageDataset
from ..fingerprints import hash_of
from .extractors import FeatureExtractor, FeatureSpec, open_extractor
from .features import FeatureSet, extract_features
from .neighbours import Groups, Neighbors, calibrate_threshold, nearest_training, relative_distances, typical_distances
from .tensor_files import read_tensors, refusing, write_tensors

__all__ = [
    "CopyGate",
    "Distances",
    "ImageViews",
    "extract_views",
    "known_groups",
    "search_copies",
    "search_training",
]

_FORMAT = 1
_KIND = "the file of a gate"


class ImageViews(NamedTuple):
    """Features of N images, with keys and description (`upright`), and `(2, N, D)` with those of the mirror images."""

    upright: FeatureSet
    features: Tensor


class Distances(NamedTuple):
    """How near N images are to training images: `relative_distances` `(N,)`, and the nearest of each."""

    relative: Tensor
    neighbors: Neighbors


class CopyGate:
    """Says which images may pass: those that are not near-copies of training images, nor of their mirror images.

    The verdict on an image depends on that image only: features are computed for one image at a time. A gate
    holds features of training images, which show what they show; keep its file where they may be.

    Args:
        training: Features of the training images.
        threshold: Relative distance in (0, 1] below which an image is a copy: see `calibrate_threshold`.
        extractor: Of the same description as the features.

    Raises:
        ValueError: If the extractor is another one, the threshold is out of range, or there are too few images.
    """

    def __init__(self, training: FeatureSet, threshold: float, extractor: FeatureExtractor) -> None:
        training.spec.require_same(extractor.spec)
        if not 0 < threshold <= 1:
            raise ValueError(f"The threshold is a relative distance in (0, 1], got {threshold}.")
        typical_distances(training.features[:1], training.features)  # says if there are too few
        self.threshold = float(threshold)
        self.extractor = extractor
        self._training = training.features.float().contiguous()

    @classmethod
    def calibrate(
        cls,
        training: ImageDataset | Tensor,
        extractor: FeatureExtractor | None = None,
        *,
        groups: Groups | None = None,
        false_alarms: float = 0.01,
        batch_size: int = 64,
    ) -> CopyGate:
        """Make a gate from training images, with a threshold from how near they are to each other.

        Args:
            training: The images, or `(M, C, H, H)` in [0, 1].
            extractor: By default `local-contrast`.
            groups: Group of each image, such as its patient: images of one patient are not compared.
            false_alarms: Share of unseen real images that the gate may refuse; to promise 0.01 takes 299 images, and
                fewer are refused (see `calibrate_threshold`).
            batch_size: Images computed at once.
        """
        extractor = extractor or open_extractor("local-contrast")
        views = extract_views(extractor, training, batch_size)
        real = search_training(views, known_groups(views, training, groups)).relative
        return cls(views.upright, calibrate_threshold(real, false_alarms), extractor)

    def __call__(self, images: Tensor) -> Tensor:
        """Whether each of `(N, C, H, H)` in [0, 1] may pass: `(N,)` bool."""
        return self.distances(images) >= self.threshold

    def distances(self, images: Tensor) -> Tensor:
        """The relative distance of each of `(N, C, H, H)` in [0, 1]: `(N,)` float64 in [0, 1]."""
        if not len(images):
            return torch.empty(0, dtype=torch.float64)
        views = torch.stack([torch.cat([self.extractor(image) for image in side.split(1)]) for side in _sides(images)])
        neighbors = nearest_training(views, self._training)
        # The last digits of matrix products depend on how many images there are, and no verdict may
        return relative_distances(neighbors, typical_distances(views, self._training)).round(decimals=12)

    def fingerprint(self) -> str:
        """A short hash that is equal only for gates of equal verdicts."""
        return hash_of(json.dumps(self._description(), sort_keys=True), self._training)[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one `.safetensors` file, whole or not at all."""
        description = {**self._description(), "fingerprint": self.fingerprint()}
        write_tensors(path, {"training": self._training}, {"gate": description})

    @classmethod
    def load(cls, path: str | os.PathLike[str], extractor: FeatureExtractor | None = None) -> CopyGate:
        """Read what `save` wrote; the extractor is needed if the gate's has weights: opened with the same ones.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is another kind of file, damaged or edited, or the extractor is not the gate's.
        """
        tensors, metadata = read_tensors(path, _KIND, "training")
        with refusing(path, _KIND):
            description, features = metadata["gate"], tensors["training"]
            spec, threshold = FeatureSpec.from_dict(description["spec"]), float(description["threshold"])
            if description["format"] != _FORMAT:
                raise ValueError(f"its format is {description['format']}, and {_FORMAT} is read")
            training = FeatureSet(features, tuple(map(str, range(len(features)))), spec)
        gate = cls(training, threshold, extractor or _open_by(spec))
        if gate.fingerprint() != description.get("fingerprint"):
            raise ValueError(f"{path} was edited after it was written: calibrate the gate again.")
        return gate

    def _description(self) -> dict[str, object]:
        return {"format": _FORMAT, "threshold": self.threshold, "spec": self.extractor.spec.to_dict()}


def extract_views(
    extractor: FeatureExtractor, images: ImageDataset | Tensor, batch_size: int = 64, progress: bool = False
) -> ImageViews:
    """Features of a collection of images (or `(N, C, H, H)` in [0, 1]) and of their mirror images, in one pass."""
    dim = extractor.spec.dim
    both = FeatureExtractor(
        replace(extractor.spec, dim=2 * dim),
        lambda batch: torch.cat([extractor(side) for side in _sides(batch)], dim=1),
    )
    found = extract_features(both, images, batch_size, progress=progress)
    upright = FeatureSet(found.features[:, :dim].contiguous(), found.keys, extractor.spec)
    return ImageViews(upright, torch.stack([upright.features, found.features[:, dim:]]))


def known_groups(views: ImageViews, images: ImageDataset | Tensor, groups: Groups | None) -> Groups | None:
    """The groups of those of `images` that could be read, and so have features; None stays None."""
    if groups is None:
        return None
    if len(groups) != len(images):
        raise ValueError(f"Give one group an image: {len(groups)} groups for {len(images)} images.")
    if isinstance(images, Tensor):
        return groups
    by_key = dict(zip(images.keys, groups, strict=True))
    return [by_key[key] for key in views.upright.keys]


def search_copies(
    images: ImageViews, training: ImageViews, groups: Groups | None = None, training_groups: Groups | None = None
) -> Distances:
    """How near images are to training images, those of their own group left out."""
    sides = {"groups": groups, "training_groups": training_groups}
    neighbors = nearest_training(images.features, training.upright.features, **sides)
    typical = typical_distances(images.features, training.upright.features, **sides)
    return Distances(relative_distances(neighbors, typical), neighbors)


def search_training(training: ImageViews, groups: Groups | None = None) -> Distances:
    """How near each training image is to the others, those of its own group left out; by default it is its own."""
    own: Groups = range(len(training.upright)) if groups is None else groups
    return search_copies(training, training, own, own)


def _sides(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images and their mirror images."""
    return images, images.flip(-1)


def _open_by(spec: FeatureSpec) -> FeatureExtractor:
    try:
        return open_extractor(spec.extractor)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"The gate needs the extractor {spec.extractor} with weights of SHA-256 {spec.weights_sha256}: open it "
            "with `open_extractor` and give it as `extractor`."
        ) from error
