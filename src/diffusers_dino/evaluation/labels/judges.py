"""The classifiers that judge synthetic images: each trained on real images without two folds of patients.

With K folds there are K (K - 1) / 2 judges; reconstructions, whose sources are in one fold, need K of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data import Preprocessing, open_images
from ...data.labels import LabelTable
from ...fingerprints import hash_of
from ...seeds import derive_seed
from ...synthesis import PlannedImage, SyntheticSet
from ..classifier import ClassifierSettings, LabelledImages
from ..folds import check_fraction, hold_out
from ..judge import Judge
from ..packed import PackedImages, pack_images
from .result import JudgedSet

__all__ = ["Judges", "SyntheticImages", "held_out_pairs"]


@dataclass(frozen=True)
class SyntheticImages:
    """A set to judge: its images as planned, less those that cannot be read, of `num_sources` sources in the plan.

    A prior's images have no source.
    """

    strategy: str
    images: PackedImages
    planned: Sequence[PlannedImage]
    num_sources: int

    @classmethod
    def open(cls, folder: str | Path, pack: str | Path, size: int, channels: int) -> SyntheticImages:
        """Open a folder that `synthesise` has completed, and pack its images to a `.npy` file, at a side in pixels."""
        made = SyntheticSet.open(folder)
        images = open_images(folder, Preprocessing(size, remove_borders=False))
        packed = pack_images(images, pack, made.plan.digest, channels)
        planned = [image for image in made.planned() if image.key in packed.places]
        return cls(made.plan.strategy, packed, planned, len(made.plan.keys))

    @property
    def is_soft(self) -> bool:
        """Whether the images were given probabilities of labels."""
        return any(image.probabilities is not None for image in self.planned)

    def given(self, labels: Sequence[str]) -> np.ndarray:
        """The probability of each label that an image was given: `(N, L)` float32; 0 or 1 unless labels are soft."""
        rows = [[(image.given or {}).get(name, 0.0) for name in labels] for image in self.planned]
        return np.array(rows, dtype=np.float32).reshape(len(self.planned), len(labels))


def held_out_pairs(folds: np.ndarray, num_folds: int) -> np.ndarray:
    """Which two folds an image's judge must not have seen: those of its sources, or theirs and the next one.

    Takes the folds `(N, 2)` int64 of both sources (one twice for a single source) of at least 3 folds, since a judge
    needs one to train on; returns `(N, 2)` int64, ascending and different.
    """
    if num_folds < 3:
        raise ValueError(f"Two folds are held out from a judge, so there must be at least 3, got {num_folds}.")
    if folds.ndim != 2 or folds.shape[1] != 2 or (folds < 0).any() or (folds >= num_folds).any():
        raise ValueError(f"Expected folds (N, 2) below {num_folds}, got {folds.shape}.")
    first, second = folds.T
    second = np.where(first == second, (first + 1) % num_folds, second)
    return np.sort(np.stack([first, second], axis=1), axis=1)


@dataclass(frozen=True)
class Judges:
    """The N real images with their labels, patients and folds `(N,)` int64, and the folder of the judges' weights.

    It travels to other processes.
    """

    real: PackedImages
    table: LabelTable
    labels: tuple[str, ...]
    folds: np.ndarray
    settings: ClassifierSettings
    folder: Path
    validation_fraction: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if self.table.keys != self.real.keys or len(self.folds) != len(self.table):
            raise ValueError(
                f"Labels and folds must be of the {len(self.real)} real images, in their order; got {len(self.table)} "
                f"and {len(self.folds)}."
            )
        check_fraction(self.validation_fraction)

    @property
    def num_folds(self) -> int:
        """How many folds there are."""
        return int(self.folds.max()) + 1

    def pairs_for(self, sets: Sequence[SyntheticImages]) -> list[tuple[int, int]]:
        """The folds that the judges of these sets must be trained without."""
        return sorted({(a, b) for one in sets for a, b in self.pairs_of(one).tolist()})

    def pairs_of(self, images: SyntheticImages) -> np.ndarray:
        """`(N, 2)` int64, the folds that are held out from the judge of each image."""
        if images.num_sources:
            return held_out_pairs(self.folds[self._sources(images)], self.num_folds)
        draws = [derive_seed(self.seed, "judge of", image.index) % self.num_folds for image in images.planned]
        return held_out_pairs(np.array([draws, draws], dtype=np.int64).T, self.num_folds)

    def train(self, pair: tuple[int, int], device: torch.device | str = "cpu") -> Path:
        """Train the judge that has not seen two folds, unless it is there; returns the file of its weights.

        ValueError if the file is of another judge, or of other images or settings.
        """
        rows = np.flatnonzero(~np.isin(self.folds, pair))
        patients = [self.table.patients[row] for row in rows.tolist()]
        targets, seed = self.table.targets(self.labels)[rows], derive_seed(self.seed, "judge", *pair)
        aside = hold_out(targets, patients, self.validation_fraction, seed)
        validation = self._labelled(rows[aside]) if aside.any() else None
        return self._judge(pair).train(self._labelled(rows[~aside]), validation, self.seed, device)

    def judge_real(self, pair: tuple[int, int], device: torch.device | str = "cpu") -> tuple[np.ndarray, np.ndarray]:
        """Numbers `(n,)` of the real images that a judge has not seen, and their probabilities `(n, L)`."""
        rows = np.flatnonzero(np.isin(self.folds, pair))
        return rows, self._judge(pair).predict(self._labelled(rows), device)

    def judge(self, images: SyntheticImages, device: torch.device | str = "cpu") -> JudgedSet:
        """Judge synthetic images and the sources whose labels they have, each by a judge that has not seen them.

        The images of a prior have no sources: one of the judges is drawn for each, and each counts as a patient.
        ValueError if a source is not among the real images, or an image has no labels or others than its source.
        """
        unlabelled = [image.key for image in images.planned if image.labels is None]
        if unlabelled:
            raise ValueError(f"{len(unlabelled)} synthetic images have no labels to judge, such as {unlabelled[0]}.")
        targets = images.given(self.labels) == 1
        fractions = np.array([image.fraction for image in images.planned])
        pairs, synthetic = self.scores(images, device)
        sources, rounds = None, np.zeros(len(fractions))
        patients = tuple(image.key for image in images.planned)
        if images.num_sources:
            ends = self._sources(images)
            nearer = np.where(fractions <= 0.5, ends[:, 0], ends[:, 1])  # as `interpolated_labels` has it
            others = (targets != self.table.targets(self.labels)[nearer]).any(axis=1)
            if others.any():
                raise ValueError(
                    f"{int(others.sum())} of {len(others)} images of {images.images.path} have other labels than the "
                    "sources that they have them from: give the table of labels that the set was made with."
                )
            sources = np.empty_like(synthetic)
            for pair, rows in _groups(pairs):
                used, place = np.unique(nearer[rows], return_inverse=True)
                sources[rows] = self._judge(pair).predict(self._labelled(used), device)[place]
            rounds = np.array([image.index + 1 for image in images.planned]) / images.num_sources
            patients = tuple(self.table.patients[row] for row in nearer.tolist())
        numbers = pairs @ np.array([self.num_folds, 1])
        return JudgedSet(images.strategy, numbers, patients, fractions, rounds, targets, synthetic, sources)

    def scores(self, images: SyntheticImages, device: torch.device | str = "cpu") -> tuple[np.ndarray, np.ndarray]:
        """The folds held out from each image's judge, `(N, 2)` int64, and its probabilities, `(N, L)` float32."""
        pairs, given = self.pairs_of(images), images.given(self.labels)
        places = np.array([images.images.places[image.key] for image in images.planned])
        found = np.empty(given.shape, np.float32)
        for pair, rows in _groups(pairs):
            found[rows] = self._judge(pair).predict(LabelledImages(images.images, places[rows], given[rows]), device)
        return pairs, found

    def _sources(self, images: SyntheticImages) -> np.ndarray:
        """`(N, 2)` int64, numbers of the real images at both ends; one twice for a variation of it."""
        if not len(images.planned):
            raise ValueError(f"There is no image in {images.images.path}.")
        missing = {key for image in images.planned for key in image.sources} - self.real.places.keys()
        if missing:
            raise ValueError(
                f"{len(missing)} sources of {images.images.path} are not among the {len(self.real)} real images, such "
                f"as {min(missing)}: give the images that the set was made from, or a judge may have seen its sources."
            )
        ends = [(image.sources[0], image.sources[-1]) for image in images.planned]
        return np.array([[self.real.places[key] for key in keys] for keys in ends], dtype=np.int64)

    def _labelled(self, rows: np.ndarray) -> LabelledImages:
        return LabelledImages(self.real, rows, self.table.targets(self.labels)[rows])

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return self.settings.facts()  # which reads a file of weights: once for all judges

    def _judge(self, pair: tuple[int, int]) -> Judge:
        rows = zip(self.table.keys, self.table.patients, self.folds.tolist(), strict=True)
        targets = self.table.targets(self.labels).tobytes().hex()
        options = (self.labels, self.validation_fraction, self.seed, tuple(sorted(self._settings.items())))
        digest = hash_of(pair, tuple(rows), targets, options, self.real.recipe)
        return Judge(self.folder / f"judge-{pair[0]}-{pair[1]}.safetensors", self.settings, digest)


def _groups(pairs: np.ndarray) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """Each of the pairs `(N, 2)`, and the rows that have it."""
    for pair in sorted({(a, b) for a, b in pairs.tolist()}):
        yield pair, np.flatnonzero((pairs == pair).all(axis=1))
