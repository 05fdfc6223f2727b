"""What the evaluation modules share: their description, rows of features in, a reference from memory or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor

from diffusers_dino.metrics import FeatureSet, GaussianStatistics

__all__ = ["FeatureModule", "to_tensor"]

_FROM_FILE = "from_file"  # configuration of a module whose reference is a file
_REFERENCES = """
    references: features of as many real images, (N, D). With evaluate.load(path, "from_file") they are left out.
    reference_file: then, a file of a `FeatureSet`{statistics}."""


class FeatureModule(evaluate.Metric):
    """A figure of features. The docstring of a module says what it measures, `figures` computes it."""

    published: str  # where
    returns: str  # the names of its figures
    arguments = ""  # lines on arguments of its own
    paired = True  # whether it has references at all
    takes_statistics = False  # whether a reference may be a file of `GaussianStatistics`

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.Sequence(datasets.Value("float32"))
        columns = {"predictions": row}
        if self.paired and self.config_name != _FROM_FILE:
            columns["references"] = row
        statistics = " or of `GaussianStatistics`" if self.takes_statistics else ""
        references = _REFERENCES.format(statistics=statistics) if self.paired else ""
        usage = f"Args:\n    predictions: features of the generated images, (N, D).{references}{self.arguments}"
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation=self.published,
            inputs_description=f"{usage}\nReturns:\n    {self.returns}.\n",
            features=datasets.Features(columns),
        )

    def _compute(self, predictions: Any, **given: Any) -> dict[str, Any]:
        features = to_tensor(predictions)
        counts = {"num_predictions": len(features)}
        if self.paired:
            references, file = (given.pop(name, None) for name in ("references", "reference_file"))
            given["reference"] = reference = _reference(references, file, self.takes_statistics)
            counts["num_references"] = reference.count if isinstance(reference, GaussianStatistics) else len(reference)
        return {**self.figures(features, **given), **counts}

    def figures(self, features: Tensor, **given: Any) -> dict[str, Any]:
        """The figures of features `(N, D)`, the reference if the module has one, and arguments of its own, by name."""
        raise NotImplementedError


def to_tensor(rows: Any) -> Tensor:
    """Rows as `evaluate` hands them over, as a tensor `(N, D)`; ValueError if they differ in length."""
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise ValueError(f"All features have one width, got rows of {', '.join(map(str, sorted(lengths)))} numbers.")
    return torch.from_numpy(np.stack([np.asarray(row, np.float32) for row in rows]))


def _reference(references: Any, file: str | Path | None, takes_statistics: bool) -> Tensor | GaussianStatistics:
    """The reference from its rows or from a file; ValueError if neither or both are given."""
    if references is None and file is None:
        raise ValueError(f"compute() of the configuration {_FROM_FILE!r} needs `reference_file`, a file of features.")
    if references is not None and file is not None:
        raise ValueError(f'For a reference from a file, load the module with evaluate.load(path, "{_FROM_FILE}").')
    if references is not None:
        return to_tensor(references)
    if not takes_statistics:
        return FeatureSet.load(file).features
    try:
        return GaussianStatistics.load(file)
    except ValueError as not_statistics:  # it is another kind of file, or damaged
        try:
            return FeatureSet.load(file).features
        except ValueError as not_features:
            raise ValueError(f"As statistics: {not_statistics} As features: {not_features}") from None
