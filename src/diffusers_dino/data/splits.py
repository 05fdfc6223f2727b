"""Which patients are for training and which are kept aside: a function of the patient, whoever else is in the set."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..seeds import derive_seed

__all__ = ["SPLITS", "SplitRule", "assign_splits", "link_patients"]

# The later one wins where the members of a group disagree: what tests must not have trained.
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class SplitRule:
    """How patients are split.

    A patient's split follows from the seed and the patient's hash, so a patient keeps it when sources are added, in
    any order and on any machine. In return, the fractions are only met on average.

    Args:
        validation, test: Probabilities of these splits; together below 1.
        seed: Seed of the draw.
        official: Whether to keep the splits of the providers; images without one are drawn.
    """

    validation: float = 0.0
    test: float = 0.1
    seed: int = 0
    official: bool = False

    def __post_init__(self) -> None:
        if self.validation < 0 or self.test < 0 or self.validation + self.test >= 1:
            raise ValueError(
                f"The fractions of validation and test must be in [0, 1) and leave some for training, got "
                f"{self.validation} and {self.test}."
            )

    def draw(self, patient: str) -> str:
        """The split of a patient, given as a salted hash."""
        place = derive_seed(self.seed, "split", patient) / 2**63  # uniform in [0, 1)
        if place < self.test:
            return "test"
        return "validation" if place < self.test + self.validation else "train"


def link_patients(patients: Sequence[str], links: np.ndarray) -> np.ndarray:
    """The group `(N,)` of each image: images of a patient, and of patients who share a picture, must share a split.

    `links` `(P, 2)` are pairs of image numbers that are the same picture.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    _, owner = np.unique(np.asarray(patients), return_inverse=True)
    count = int(owner.max(initial=-1)) + 1
    ends = owner[np.asarray(links, dtype=np.int64).reshape(-1, 2)]  # (P, 2) patients
    graph = coo_matrix((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1][owner]


def assign_splits(
    patients: Sequence[str], official: Sequence[str | None], groups: np.ndarray, rule: SplitRule
) -> list[str]:
    """The split of each image, by its patient's salted hash, the provider's split and its group of `link_patients`.

    The images of a group each ask for a split: the provider's, if the rule keeps those, else the draw of their
    patient. If they differ, the whole group goes to the last one of `SPLITS` that is asked for, so that no copy of a
    test image trains.
    """
    drawn = {patient: rule.draw(patient) for patient in set(patients)}
    asked: defaultdict[int, int] = defaultdict(int)
    for patient, given, group in zip(patients, official, groups.tolist(), strict=True):
        wish = given if rule.official and given else drawn[patient]
        asked[group] = max(asked[group], SPLITS.index(wish))
    return [SPLITS[asked[group]] for group in groups.tolist()]
