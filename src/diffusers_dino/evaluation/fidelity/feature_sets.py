"""Fidelity of images that are there already, whoever made them: sets of features against those of real images."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from ...metrics import FeatureSet
from ...metrics.bootstrap import Bootstrap
from .protocol import FidelityResult, FidelityScores, score_fidelity

__all__ = ["LabelledFeatures", "compare_features"]


class LabelledFeatures(NamedTuple):
    """Features, and by key the labels (None, or an image that is not there: unknown) and patients of their images."""

    features: FeatureSet
    labels: Mapping[str, frozenset[str]] | None = None
    patients: Mapping[str, str] | None = None

    def having(self, label: str) -> LabelledFeatures:
        """Those of the images that have a label."""
        keys = [key for key in self.features.keys if label in (self.labels or {}).get(key, ())]
        return self._replace(features=self.features.select(keys))

    @property
    def groups(self) -> list[str] | None:
        """The patient of each image."""
        return None if self.patients is None else [self.patients[key] for key in self.features.keys]


def compare_features(
    sets: Mapping[str, LabelledFeatures],
    reference: LabelledFeatures,
    *,
    neighbors: int = 5,
    bootstrap_repeats: int = 200,
    fewest: int = 50,
    seed: int = 0,
) -> FidelityResult:
    """A row for each set by name, then for each label that `fewest` images of the set and of the reference have.

    Arguments are those of `evaluate_fidelity`. ValueError if a set has not more images than `neighbors`.
    """
    fewest = max(fewest, neighbors + 1)

    def row(name: str, ours: LabelledFeatures, theirs: LabelledFeatures, label: str | None = None) -> FidelityScores:
        bootstrap = Bootstrap(bootstrap_repeats, seed, 0.95, ours.groups, theirs.groups)
        with warnings.catch_warnings():  # the table says which sets are small
            warnings.filterwarnings("ignore", ".*too few for features")
            return score_fidelity(
                name, ours.features, theirs.features, neighbors=neighbors, bootstrap=bootstrap, label=label
            )

    smallest = min((len(one.features) for one in (*sets.values(), reference)), default=0)
    if smallest <= neighbors:
        raise ValueError(f"Distances of sets take more than {neighbors} images of each, and one set has {smallest}.")
    by_label: list[FidelityScores] = []
    too_few: list[str] = []
    counts = Counter(label for labels in (reference.labels or {}).values() for label in labels)
    for label in sorted(counts, key=lambda name: (-counts[name], name)):
        theirs, shares = reference.having(label), {name: one.having(label) for name, one in sets.items() if one.labels}
        enough = [name for name, one in shares.items() if min(len(one.features), len(theirs.features)) >= fewest]
        by_label += [row(name, shares[name], theirs, label) for name in enough]
        if len(enough) < len(shares):
            too_few.append(label)
    rows = tuple(row(name, one, reference) for name, one in sets.items())
    return FidelityResult(rows, tuple(by_label), tuple(too_few))
