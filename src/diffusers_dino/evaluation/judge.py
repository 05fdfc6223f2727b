"""A judge: a classifier of real images that is trained once, kept in a file, and asked about other images.

It also decides which synthetic images to drop, because it contradicts a label that they were given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..devices import deterministic
from ..files import atomic_write
from ..fingerprints import hash_of
from .classifier import ClassifierSettings, LabelledImages, make_classifier, predict, train_classifier
from .folds import check_fraction

__all__ = ["Judge", "Limits", "check_left"]


@dataclass(frozen=True)
class Judge:
    """A classifier in a file.

    Args:
        path: The file.
        settings: Its architecture and training.
        digest: Of all that it depends on; a file of another digest is refused.
    """

    path: Path
    settings: ClassifierSettings
    digest: str

    def train(
        self, train: LabelledImages, validation: LabelledImages | None, seed: int, device: torch.device | str = "cpu"
    ) -> Path:
        """Train it, unless it is there; ValueError if the file is another judge's. Returns the file."""
        if self.path.is_file():
            self._load()
            return self.path
        with deterministic(threads=1):
            model = train_classifier([train], validation, self.settings, seed, device).model
        with atomic_write(self.path) as file:
            weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
            # one entry: several are written in random order
            file.write(save(weights, {"digest": f"{self.digest} {_checksum(weights)}"}))
        return self.path

    def predict(self, images: LabelledImages, device: torch.device | str = "cpu") -> np.ndarray:
        """Probabilities `(N, L)` float32 of the labels."""
        weights = self._load()
        model = make_classifier(self.settings, images.targets.shape[1])
        model.load_state_dict(weights)
        with deterministic(threads=1):
            return predict(model.to(device), images, device)

    def _load(self) -> dict[str, torch.Tensor]:
        """The weights; ValueError if the file is damaged, or another judge's."""
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no judge {self.path}: train it first.")
        try:
            with safe_open(self.path, "pt") as file:
                digest, _, checksum = (file.metadata() or {}).get("digest", "").partition(" ")
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{self.path} is damaged ({error}): delete it and run again.") from error
        if digest != self.digest:
            raise ValueError(
                f"{self.path} was trained on other images, labels, folds or settings: delete it, or take another "
                "folder."
            )
        if checksum not in ("", _checksum(weights)):  # older versions wrote none
            raise ValueError(f"{self.path} is damaged (its weights have changed): delete it and run again.")
        return weights


@dataclass(frozen=True)
class Limits:
    """What a judge may say of L labels before it contradicts one.

    Attributes:
        least: `(L,)`, the smallest probability of a label that an image has.
        most: `(L,)`, the largest of one that it does not have.
    """

    least: np.ndarray
    most: np.ndarray

    @classmethod
    def of_real(cls, probabilities: np.ndarray, targets: np.ndarray, false_alarms: float) -> Limits:
        """The limits that contradict at most this share of correct labels, present or absent, of real images.

        Takes what the judge says of N real images that it has not seen, `(N, L)`, and their labels, `(N, L)` bool. A
        label that none of them has, or all have, is never contradicted there.
        """
        check_fraction(false_alarms, "false_alarms")
        present = [column[own] for column, own in zip(probabilities.T, targets.T, strict=True)]
        absent = [column[~own] for column, own in zip(probabilities.T, targets.T, strict=True)]
        least = [np.quantile(p, false_alarms, method="lower") if len(p) else 0.0 for p in present]
        most = [np.quantile(p, 1 - false_alarms, method="higher") if len(p) else 1.0 for p in absent]
        return cls(np.array(least), np.array(most))

    def contradicted(self, probabilities: np.ndarray, given: np.ndarray) -> np.ndarray:
        """`(N, L)` bool: which labels of images a judge contradicts, by what it says and by what they were given.

        Both are `(N, L)` in [0, 1]. A soft label between 0 and 1 says neither "present" nor "absent", so nothing
        contradicts it.
        """
        return (given == 1) & (probabilities < self.least) | (given == 0) & (probabilities > self.most)


def check_left(given: np.ndarray, kept: np.ndarray, labels: tuple[str, ...]) -> None:
    """ValueError if no image of a label is left of those that were given it: `(N, L)` in [0, 1], and `(N,)` bool."""
    had, left = (given == 1).sum(axis=0), (given[kept] == 1).sum(axis=0)
    for name, before, after in zip(labels, had.tolist(), left.tolist(), strict=True):
        if before and not after:
            raise ValueError(
                f"The judge contradicts all {before} images of {name!r}, so none would be left. Either the images do "
                "not show it, or the judge does not see it: look at its AUROC, or allow fewer false alarms."
            )


def _checksum(weights: Mapping[str, torch.Tensor]) -> str:
    return hash_of(*(part for name in sorted(weights) for part in (name, weights[name])))
