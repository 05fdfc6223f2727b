"""A gate that keeps near-copies of training images out of a synthetic set."""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import ImageDataset
from ..fingerprints import hash_of
from ..tensor_files import read_tensors, refusing, write_tensors
from .extractors import FeatureExtractor, FeatureSpec, open_extractor
from .features import FeatureSet, extract_features
from .neighbours import (
    Groups,
    Neighbors,
    calibrate_threshold,
    encode_groups,
    nearest_training,
    relative_distances,
    typical_distances,
)
from .registration import SIDE, Laid, PictureSearch, pictures_of

__all__ = [
    "SPOILED",
    "CopyGate",
    "Distances",
    "ImageViews",
    "extract_views",
    "known_groups",
    "search_copies",
    "search_features",
    "search_training",
]

logger = logging.getLogger(__name__)

_FORMAT = 2  # 1, which is read too, had no pictures
_KIND = "the file of a gate"
_LOW, _MIDDLE = 0.05, 0.5  # quantiles of real images at which both distances are made equal
SPOILED = 0.45  # of the median: real images that are nearer than that are hardly of different people


class ImageViews(NamedTuple):
    """Features of N images, with keys and description (`upright`), and `(2, N, D)` with those of the mirror images.

    Pictures are those of `pictures_of`; None leaves the second stage of a search out.
    """

    upright: FeatureSet
    features: Tensor
    pictures: Tensor | None = None


class Distances(NamedTuple):
    """How near N images are to training images.

    Attributes:
        relative: `relative_distances` of features `(N,)`.
        neighbors: The nearest of each, by features.
        laid: What fits best when laid over each; None without pictures.
        balance: Factor and power that bring distances of pictures to the scale of those of features.
    """

    relative: Tensor
    neighbors: Neighbors
    laid: Laid | None = None
    balance: tuple[float, float] = (1.0, 1.0)

    def balanced(self, real: Distances) -> Distances:
        """With the balance at which as many of these real images are near by features as by pictures."""
        if self.laid is None or real.laid is None:
            return self
        (low, middle), (low_picture, middle_picture) = (
            [distances.quantile(share).item() for share in (_LOW, _MIDDLE)]
            for distances in (real.relative, real.laid.distance)
        )
        if not (0 < low < middle and low_picture < middle_picture):  # many are copies, or all far away
            return self
        power = math.log(middle / low) / math.log(middle_picture / low_picture)
        return self._replace(balance=(low / low_picture**power, power))

    @property
    def smallest(self) -> Tensor:
        """The smaller of both distances `(N,)` in [0, 1], which decides."""
        return self.relative if self.laid is None else self.relative.minimum(self._by_pictures)

    @property
    def nearest(self) -> tuple[Tensor, Tensor]:
        """The training image that decides `(N,)`, and whether the mirror image is what is near it `(N,)`."""
        index, mirrored = self.neighbors.index, self.neighbors.view.bool()
        if self.laid is None:
            return index, mirrored
        by_picture = self._by_pictures < self.relative
        return (torch.where(by_picture, self.laid.index, index), torch.where(by_picture, self.laid.mirrored, mirrored))

    @property
    def _by_pictures(self) -> Tensor:
        factor, power = self.balance
        return factor * self.laid.distance**power


class CopyGate:
    """Says which images may pass: those that are not near-copies of training images, nor of their mirror images.

    An image is compared by its features, and by a small picture that is laid over those of training images, which
    finds copies that were moved, turned, cropped or partly covered. The verdict depends on that image only. A gate
    holds features and pictures of training images, which show what they show; keep its file where they may be.

    Args:
        training: Features of the training images.
        threshold: Relative distance in (0, 1] below which an image is a copy: see `calibrate_threshold`.
        extractor: Of the same description as the features.
        pictures: Those of the training images by `pictures_of`, `(M, 32, 32)` uint8. None leaves them out, as in gates
            of version 1.
        balance: Factor and power that bring distances of pictures to the scale of those of features.

    ValueError if the extractor is another one, numbers are out of range, or there are too few images.
    """

    def __init__(
        self,
        training: FeatureSet,
        threshold: float,
        extractor: FeatureExtractor,
        pictures: Tensor | None = None,
        balance: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        training.spec.require_same(extractor.spec)
        if not 0 < threshold <= 1:
            raise ValueError(f"The threshold is a relative distance in (0, 1], got {threshold}.")
        if len(balance) != 2 or not all(0 < value < math.inf for value in balance):
            raise ValueError(f"The balance is two positive numbers, got {balance}.")
        if pictures is not None and (pictures.dtype != torch.uint8 or pictures.shape != (len(training), SIDE, SIDE)):
            raise ValueError(
                f"{len(training)} images have pictures of {SIDE} px in uint8, got {tuple(pictures.shape)}."
            )
        typical_distances(training.features[:1], training.features)  # says if there are too few
        self.threshold, self.balance = float(threshold), tuple(map(float, balance))
        self.extractor = extractor
        self._training = training.features.float().contiguous()
        self.pictures = pictures
        self._search = None if pictures is None else PictureSearch(pictures)

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
        return cls.of(views, search_training(views, known_groups(views, training, groups)), extractor, false_alarms)

    @classmethod
    def of(
        cls, training: ImageViews, real: Distances, extractor: FeatureExtractor, false_alarms: float = 0.01
    ) -> CopyGate:
        """The gate of which at most a share of `false_alarms` of images like the `real` ones are refused."""
        real = real.balanced(real)
        threshold = calibrate_threshold(real.smallest, false_alarms)
        if threshold < SPOILED * real.smallest.median():
            logger.warning(
                "A few real images are so near to images of other groups (the nearest at %.2f) that the gate finds "
                "few copies: are they of the same patient, or duplicates? Leave them out and calibrate again.",
                real.smallest.min().item(),
            )
        return cls(training.upright, threshold, extractor, training.pictures, real.balance)

    def __call__(self, images: Tensor) -> Tensor:
        """Whether each of `(N, C, H, H)` in [0, 1] may pass: `(N,)` bool."""
        return self.distances(images) >= self.threshold

    def distances(self, images: Tensor) -> Tensor:
        """The relative distance of each of `(N, C, H, H)` in [0, 1]: `(N,)` float64 in [0, 1]."""
        return self.search(images).smallest if len(images) else torch.empty(0, dtype=torch.float64)

    def search(self, images: Tensor) -> Distances:
        """How near each of `(N, C, H, H)` in [0, 1] is to the training images, and which one is nearest."""
        views = torch.stack([torch.cat([self.extractor(image) for image in side.split(1)]) for side in _sides(images)])
        neighbors = nearest_training(views, self._training)
        # The last digits of matrix products depend on how many images there are, and no verdict may
        relative = relative_distances(neighbors, typical_distances(views, self._training)).round(decimals=12)
        laid = None if self._search is None else self._search(pictures_of(images))
        return Distances(relative, neighbors, laid, self.balance)

    def __len__(self) -> int:
        """The number of training images."""
        return len(self._training)

    def fingerprint(self) -> str:
        """A short hash that is equal only for gates of equal verdicts."""
        return hash_of(json.dumps(self._description(), sort_keys=True), *self._tensors().values())[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one `.safetensors` file, whole or not at all."""
        write_tensors(path, self._tensors(), {"gate": {**self._description(), "fingerprint": self.fingerprint()}})

    @classmethod
    def load(cls, path: str | os.PathLike[str], extractor: FeatureExtractor | None = None) -> CopyGate:
        """Read what `save` wrote; the extractor is needed if the gate's has weights: opened with the same ones.

        ValueError if it is another kind of file, damaged or edited, or the extractor is not the gate's.
        """
        tensors, metadata = read_tensors(path, _KIND, "training", optional="pictures")
        with refusing(path, _KIND):
            description, features, pictures = metadata["gate"], tensors["training"], tensors.get("pictures")
            spec, threshold = FeatureSpec.from_dict(description["spec"]), float(description["threshold"])
            if description["format"] not in (1, _FORMAT):
                raise ValueError(f"its format is {description['format']}, and 1 to {_FORMAT} are read")
            training = FeatureSet(features, tuple(map(str, range(len(features)))), spec)
            balance = tuple(map(float, description.get("balance", (1.0, 1.0))))
        extractor = extractor or _open_by(spec)
        gate = cls(training, threshold, extractor, pictures, balance)
        if gate.fingerprint() != description.get("fingerprint"):
            raise ValueError(f"{path} was edited after it was written: calibrate the gate again.")
        return gate

    def _tensors(self) -> dict[str, Tensor]:
        pictures = {} if self.pictures is None else {"pictures": self.pictures}
        return {"training": self._training, **pictures}

    def _description(self) -> dict[str, object]:
        described = {"format": 1, "threshold": self.threshold, "spec": self.extractor.spec.to_dict()}
        return described if self.pictures is None else {**described, "format": _FORMAT, "balance": self.balance}


def extract_views(
    extractor: FeatureExtractor, images: ImageDataset | Tensor, batch_size: int = 64, progress: bool = False
) -> ImageViews:
    """Features of a collection of images (or `(N, C, H, H)` in [0, 1]) and of their mirror images, and pictures."""
    dim = extractor.spec.dim
    # in one pass: all three are one feature
    together = FeatureExtractor(
        replace(extractor.spec, dim=2 * dim + SIDE * SIDE),
        lambda batch: torch.cat(
            [*(extractor(side) for side in _sides(batch)), pictures_of(batch).flatten(1).float()], dim=1
        ),
    )
    found = extract_features(together, images, batch_size, progress=progress)
    upright, mirrored, pictures = found.features.split([dim, dim, SIDE * SIDE], dim=1)
    upright = FeatureSet(upright.contiguous(), found.keys, extractor.spec)
    pictures = pictures.to(torch.uint8).view(-1, SIDE, SIDE)
    return ImageViews(upright, torch.stack([upright.features, mirrored]), pictures)


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
    found = search_features(images.features, training.upright.features, groups, training_groups)
    if images.pictures is None or training.pictures is None:
        return found
    codes = encode_groups(groups, training_groups, len(images.pictures), len(training.pictures))
    return found._replace(laid=PictureSearch(training.pictures)(images.pictures, *codes))


def search_features(
    features: Tensor, training: Tensor, groups: Groups | None = None, training_groups: Groups | None = None
) -> Distances:
    """`search_copies` by features only, `(N, D)` or `(V, N, D)`, among those of training images `(M, D)`."""
    sides = {"groups": groups, "training_groups": training_groups}
    neighbors = nearest_training(features, training, **sides)
    return Distances(relative_distances(neighbors, typical_distances(features, training, **sides)), neighbors)


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
