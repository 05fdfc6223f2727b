"""One cell of the classification grid: a classifier's training images, and its predictions of images of its test fold.

A cell is a file of its own, written whole or not at all; tables and tests are made from these files only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ...devices import deterministic
from ...files import atomic_write
from ...fingerprints import hash_of
from ...seeds import derive_seed
from ..classifier import ClassifierSettings, LabelledImages, predict, train_classifier

__all__ = [
    "AUGMENTATION",
    "BALANCED",
    "FULL_SYNTHETIC",
    "IDENTICAL",
    "INTERPOLATION",
    "JUDGED",
    "PRIOR",
    "REAL",
    "RECONSTRUCTION",
    "SOFT",
    "STRATEGIES",
    "CellFacts",
    "CellJob",
    "CellResult",
    "CellSpec",
    "grid_of",
    "images_of",
    "load_cells",
    "order_of",
    "run_cell",
]

REAL, RECONSTRUCTION, INTERPOLATION = "real", "reconstruction", "interpolation"
IDENTICAL, SOFT = "interpolation-identical", "interpolation-soft"
PRIOR, BALANCED = "prior", "prior-balanced"
JUDGED = "+judge"  # behind a strategy: its images but those that a judge contradicts
STRATEGIES = (RECONSTRUCTION, INTERPOLATION, IDENTICAL, SOFT, PRIOR, BALANCED)
AUGMENTATION, FULL_SYNTHETIC = "augmentation", "full-synthetic"
_SUFFIX = ".safetensors"


def images_of(strategy: str) -> str:
    """The strategy whose images this one trains on: soft labels and judges are tried on the very same images."""
    base = strategy.removesuffix(JUDGED)
    return INTERPOLATION if base == SOFT else base


def order_of(strategy: str) -> tuple[int, bool]:
    """Where a strategy stands in tables: the paper's first, a judged one behind that of the same images."""
    base = strategy.removesuffix(JUDGED)
    return STRATEGIES.index(base) if base in STRATEGIES else -1, base != strategy


@dataclass(frozen=True, order=True)
class CellSpec:
    """Where a cell stands in the grid.

    Args:
        strategy: How synthetic images were made and labelled, one of `STRATEGIES`, maybe with `JUDGED` behind it;
            `REAL` for the baseline.
        mode: `AUGMENTATION` trains on real and synthetic images, `FULL_SYNTHETIC` on synthetic ones only; `REAL`.
        ratio: Synthetic images for each real one; 0 for the baseline.
        regime: Number of real images, from which the synthetic ones are made.
        fold: Whose patients are tested.
    """

    strategy: str
    mode: str
    ratio: int
    regime: int
    fold: int

    def __post_init__(self) -> None:
        baseline = (self.strategy, self.mode, self.ratio) == (REAL, REAL, 0)
        known = self.strategy.removesuffix(JUDGED) in STRATEGIES
        synthetic = known and self.mode in (AUGMENTATION, FULL_SYNTHETIC)
        if not (baseline or (synthetic and self.ratio >= 1)) or self.regime < 1 or self.fold < 0:
            raise ValueError(
                f"There is no cell {self.name}: a strategy of {', '.join(STRATEGIES)}, maybe with {JUDGED} behind it, "
                f"goes with a mode of {AUGMENTATION!r} or {FULL_SYNTHETIC!r} and a ratio of 1 or more, and {REAL!r} "
                f"with {REAL!r} and 0."
            )

    @property
    def name(self) -> str:
        """In messages, and as a file."""
        kind = REAL if self.strategy == REAL else f"{self.strategy}-{self.mode}-1to{self.ratio}"
        return f"{kind}-regime{self.regime}-fold{self.fold}"

    @property
    def is_baseline(self) -> bool:
        """Whether it was trained on real images only."""
        return self.strategy == REAL


@dataclass(frozen=True)
class CellFacts:
    """How a cell came about.

    Attributes:
        num_real, num_synthetic: Images that were trained on.
        num_validation: Real images that chose the weights, of patients that are neither trained on nor tested.
        best_step, validation_auroc: As in `TrainedClassifier`.
        seconds: Wall-clock time of training and prediction.
        settings: Digest of the experiment's settings; cells of one table have one.
        plan: Digest of the plan of the synthetic images; empty for the baseline.
    """

    num_real: int
    num_synthetic: int
    num_validation: int
    steps: int
    best_step: int
    validation_auroc: float
    seconds: float
    seed: int
    settings: str
    plan: str
    model: str
    device: str


@dataclass(frozen=True)
class CellResult:
    """The predictions of one cell's classifier on the N images of its test fold, with their keys and patients.

    Attributes:
        probabilities: `(N, L)` float32 in [0, 1].
        targets: `(N, L)` bool.
    """

    spec: CellSpec
    labels: tuple[str, ...]
    keys: tuple[str, ...]
    patients: tuple[str, ...]
    probabilities: np.ndarray
    targets: np.ndarray
    facts: CellFacts

    def __post_init__(self) -> None:
        shape = (len(self.keys), len(self.labels))
        if not self.probabilities.shape == self.targets.shape == shape or len(self.patients) != len(self.keys):
            raise ValueError(
                f"{self.spec.name}: {len(self.keys)} images, {len(self.patients)} patients and {len(self.labels)} "
                f"labels do not fit probabilities {self.probabilities.shape} and targets {self.targets.shape}."
            )
        # written so that a NaN does not pass
        if not ((self.probabilities >= 0) & (self.probabilities <= 1)).all():
            raise ValueError(f"{self.spec.name}: not all probabilities are in [0, 1]; did training diverge?")

    def save(self, folder: str | Path) -> Path:
        """Write the cell's file into a folder, whole or not at all, and return its path."""
        strings = {"labels": self.labels, "keys": self.keys, "patients": self.patients}
        text = {"spec": asdict(self.spec), "facts": asdict(self.facts), **strings}
        tensors = {"probabilities": self.probabilities.astype(np.float32), "targets": self.targets.astype(bool)}
        text["checksum"] = hash_of(*map(torch.from_numpy, tensors.values()))
        path = self.path(folder, self.spec)
        with atomic_write(path) as file:
            file.write(save(tensors, {name: json.dumps(value) for name, value in text.items()}))
        return path

    @classmethod
    def load(cls, path: str | Path) -> CellResult:
        """Read what `save` wrote; ValueError if the file is damaged or not a cell."""
        try:
            with safe_open(path, "numpy") as file:
                text = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
                probabilities, targets = file.get_tensor("probabilities"), file.get_tensor("targets")
            checksum = text.get("checksum")  # older versions wrote none
            if checksum not in (None, hash_of(torch.from_numpy(probabilities), torch.from_numpy(targets))):
                raise KeyError("its figures have changed")
            strings = (tuple(text[name]) for name in ("labels", "keys", "patients"))
            return cls(CellSpec(**text["spec"]), *strings, probabilities, targets, CellFacts(**text["facts"]))
        except (SafetensorError, KeyError, TypeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a whole cell of a grid ({error}): delete it and run again.") from error

    @staticmethod
    def path(folder: str | Path, spec: CellSpec) -> Path:
        """The file of a cell in a folder."""
        return Path(folder) / f"{spec.name}{_SUFFIX}"


def load_cells(folder: str | Path) -> list[CellResult]:
    """All cells of a folder, at least one, in the order of the grid."""
    cells = [CellResult.load(path) for path in sorted(Path(folder).glob(f"*{_SUFFIX}"))]
    if not cells:
        raise FileNotFoundError(f"There is no cell of a grid in {str(folder)!r}.")
    return sorted(cells, key=lambda cell: cell.spec)


def grid_of(
    regimes: Sequence[int],
    ratios: Sequence[int],
    num_folds: int,
    strategies: Sequence[str] = (RECONSTRUCTION, INTERPOLATION),
    modes: Sequence[str] = (AUGMENTATION, FULL_SYNTHETIC),
) -> list[CellSpec]:
    """All cells of a grid: for each regime and fold the baseline, then every strategy, mode and ratio."""
    kinds = [(REAL, REAL, 0), *((s, m, r) for s in strategies for m in modes for r in sorted(set(ratios)))]
    places = [(regime, fold) for regime in sorted(set(regimes), reverse=True) for fold in range(num_folds)]
    return [CellSpec(*kind, *place) for place in places for kind in kinds]


@dataclass(frozen=True)
class CellJob:
    """All that a cell is made from; it travels to another process. Fields without a comment are as in `CellFacts`."""

    spec: CellSpec
    train: tuple[LabelledImages, ...]  # real images, synthetic ones, or both
    validation: LabelledImages  # chooses the weights; may be empty
    test: LabelledImages
    patients: tuple[str, ...]  # of the test images
    labels: tuple[str, ...]
    classifier: ClassifierSettings
    seed: int
    settings: str
    plan: str


def run_cell(job: CellJob, folder: str | Path, device: torch.device | str = "cpu") -> CellResult:
    """Train one cell's classifier, predict its test images and write the cell's file.

    The result is a function of the job: on the CPU it is computed by one thread, since sums depend on their number.
    All cells of a fold start from the same weights, so that they differ by their images only.
    """
    started = time.perf_counter()
    with deterministic(threads=1):
        seed = derive_seed(job.seed, "classifier", job.spec.fold)
        validation = job.validation if len(job.validation.rows) else None
        trained = train_classifier(job.train, validation, job.classifier, seed, device)
        probabilities = predict(trained.model, job.test, device)
    num_real = sum(len(part.rows) for part in job.train if part.images.path == job.test.images.path)
    facts = CellFacts(
        num_real=num_real,
        num_synthetic=sum(len(part.rows) for part in job.train) - num_real,
        num_validation=len(job.validation.rows),
        steps=job.classifier.max_steps,
        best_step=trained.best_step,
        validation_auroc=trained.validation_auroc,
        seconds=time.perf_counter() - started,
        seed=job.seed,
        settings=job.settings,
        plan=job.plan,
        model=job.classifier.name,
        device=str(device),
    )
    keys = tuple(job.test.images.keys[row] for row in job.test.rows.tolist())
    result = CellResult(job.spec, job.labels, keys, job.patients, probabilities, job.test.targets, facts)
    result.save(folder)
    return result
