"""The classifiers that judge synthetic images: each trained on real images without two folds of patients.

With K folds there are K (K - 1) / 2 judges; reconstructions, whose sources are in one fold, need K of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ...data import Preprocessing, open_images
from ...data.labels import LabelTable
from ...devices import deterministic
from ...files import atomic_write
from ...fingerprints import hash_of
from ...seeds import derive_seed
from ...synthesis import PlannedImage, SyntheticSet
from ..classifier import ClassifierSettings, LabelledImages, make_classifier, predict, train_classifier
from ..folds import check_fraction, hold_out
from ..packed import PackedImages, pack_images
from .result import JudgedSet

__all__ = ["Judges", "SyntheticImages", "held_out_pairs"]


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyntheticImages:
    """A set to judge: its images as planned, less those that cannot be read, of `num_sources` sources in the plan."""

    strategy: str
    images: PackedImages
    planned: Sequence[PlannedImage]
    num_sources: int

    @classmethod
    def open(cls, folder: str | Path, pack: str | Path, size: int, channels: int) -> SyntheticImages:
        """Open a folder that `synthesise` has completed, and pack its images to a `.npy` file, at a side in pixels.

        ValueError if its images have no sources, which they are to be compared with.
        """
        made = SyntheticSet.open(folder)
        if made.plan.strategy == "prior":
            raise ValueError(
                f"The images of {folder} are a prior's and have no sources to be compared with. Judge them by a "
                "classifier of real images: benchmarks/prior.py."
            )
        images = open_images(folder, Preprocessing(size, remove_borders=False))
        packed = pack_images(images, pack, made.plan.digest, channels)
        planned = [image for image in made.planned() if image.key in packed.places]
        if lost := len(images) - len(packed):
            logger.warning(f"{lost} of {len(images)} images of {folder} cannot be read and are left out.")
        return cls(made.plan.strategy, packed, planned, len(made.plan.keys))


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
        return held_out_pairs(self.folds[self._sources(images)], self.num_folds)

    def train(self, pair: tuple[int, int], device: torch.device | str = "cpu") -> Path:
        """Train the judge that has not seen two folds, unless it is there; returns the file of its weights.

        ValueError if the file is of another judge, or of other images or settings.
        """
        path = self._path(pair)
        if path.is_file():
            self._require_own(path, pair)
            return path
        rows = np.flatnonzero(~np.isin(self.folds, pair))
        patients = [self.table.patients[row] for row in rows.tolist()]
        targets, seed = self.table.targets(self.labels)[rows], derive_seed(self.seed, "judge", *pair)
        aside = hold_out(targets, patients, self.validation_fraction, seed)
        validation = self._labelled(rows[aside]) if aside.any() else None
        with deterministic(threads=1):
            train = [self._labelled(rows[~aside])]
            model = train_classifier(train, validation, self.settings, self.seed, device).model
        with atomic_write(path) as file:
            weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
            # one entry: several are written in random order
            file.write(save(weights, {"digest": f"{self._digest(pair)} {_checksum(weights)}"}))
        return path

    def judge_real(self, pair: tuple[int, int], device: torch.device | str = "cpu") -> tuple[np.ndarray, np.ndarray]:
        """Numbers `(n,)` of the real images that a judge has not seen, and their probabilities `(n, L)`."""
        rows = np.flatnonzero(np.isin(self.folds, pair))
        return rows, self._predict(pair, self._labelled(rows), device)

    def judge(self, images: SyntheticImages, device: torch.device | str = "cpu") -> JudgedSet:
        """Judge synthetic images and the sources whose labels they have, each by a judge that has not seen them.

        ValueError if a source is not among the real images, or an image has no labels or others than its source.
        """
        pairs, ends = self.pairs_of(images), self._sources(images)
        fractions = np.array([image.fraction for image in images.planned])
        nearer = np.where(fractions <= 0.5, ends[:, 0], ends[:, 1])  # as `interpolated_labels` has it
        unlabelled = [image.key for image in images.planned if image.labels is None]
        if unlabelled:
            raise ValueError(f"{len(unlabelled)} synthetic images have no labels to judge, such as {unlabelled[0]}.")
        targets = np.array([[name in image.labels for name in self.labels] for image in images.planned], dtype=bool)
        others = (targets != self.table.targets(self.labels)[nearer]).any(axis=1)
        if others.any():
            raise ValueError(
                f"{int(others.sum())} of {len(others)} images of {images.images.path} have other labels than the "
                "sources that they have them from: give the table of labels that the set was made with."
            )
        places = np.array([images.images.places[image.key] for image in images.planned])
        synthetic, sources = np.empty((2, *targets.shape), np.float32)
        for pair in sorted({(a, b) for a, b in pairs.tolist()}):
            rows = np.flatnonzero((pairs == pair).all(axis=1))
            synthetic[rows] = self._predict(pair, LabelledImages(images.images, places[rows], targets[rows]), device)
            used, place = np.unique(nearer[rows], return_inverse=True)
            sources[rows] = self._predict(pair, self._labelled(used), device)[place]
        return JudgedSet(
            strategy=images.strategy,
            judges=pairs @ np.array([self.num_folds, 1]),
            patients=tuple(self.table.patients[row] for row in nearer.tolist()),
            fractions=fractions,
            rounds=np.array([image.index for image in images.planned]) / images.num_sources,
            targets=targets,
            synthetic=synthetic,
            sources=sources,
        )

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

    def _predict(self, pair: tuple[int, int], images: LabelledImages, device: torch.device | str) -> np.ndarray:
        path = self._path(pair)
        self._require_own(path, pair)
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            checksum = file.metadata()["digest"].partition(" ")[2]
        if checksum not in ("", _checksum(weights)):  # older versions wrote none
            raise ValueError(f"{path} is damaged (its weights have changed): delete it and run again.")
        model = make_classifier(self.settings, len(self.labels))
        model.load_state_dict(weights)
        with deterministic(threads=1):
            return predict(model.to(device), images, device)

    def _path(self, pair: tuple[int, int]) -> Path:
        return self.folder / f"judge-{pair[0]}-{pair[1]}.safetensors"

    def _require_own(self, path: Path, pair: tuple[int, int]) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"There is no judge {path}: train it first.")
        try:
            with safe_open(path, "pt") as file:
                digest = (file.metadata() or {}).get("digest", "").partition(" ")[0]
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it and run again.") from error
        if digest != self._digest(pair):
            raise ValueError(
                f"{path} was trained on other images, labels, folds or settings: delete it, or take another folder."
            )

    def _digest(self, pair: tuple[int, int]) -> str:
        rows = zip(self.table.keys, self.table.patients, self.folds.tolist(), strict=True)
        targets = self.table.targets(self.labels).tobytes().hex()
        options = (self.labels, self.validation_fraction, self.seed, tuple(sorted(asdict(self.settings).items())))
        return hash_of(pair, tuple(rows), targets, options, self.real.recipe)


def _checksum(weights: Mapping[str, torch.Tensor]) -> str:
    return hash_of(*(part for name in sorted(weights) for part in (name, weights[name])))
