"""What the evaluation modules share: rows of features in, and a reference from memory or from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_dino.metrics.feature_sets import FeatureSet
from diffusers_dino.metrics.statistics import GaussianStatistics

__all__ = ["FROM_FILE", "describe", "reference_features", "reference_statistics", "to_tensor"]

FROM_FILE = "from_file"  # configuration of a module whose reference is a file


def describe(name: str, citation: str, usage: str, config_name: str | None, paired: bool = True) -> Any:
    """The `evaluate.MetricInfo` of a module.

    Args:
        name: What it measures.
        citation: Where it was published.
        usage: Its arguments and result.
        config_name: `FROM_FILE` for one that takes predictions alone.
        paired: Whether the module has references at all.
    """
    import datasets
    import evaluate

    row = datasets.Sequence(datasets.Value("float32"))
    columns = {"predictions": row}
    if paired and config_name != FROM_FILE:
        columns["references"] = row
    return evaluate.MetricInfo(
        description=name,
        citation=citation,
        inputs_description=usage,
        features=datasets.Features(columns),
    )


def to_tensor(rows: Any) -> Tensor:
    """Rows as `evaluate` hands them over, as a tensor `(N, D)`.

    Raises:
        ValueError: If the rows differ in length.
    """
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise ValueError(f"All features have one width, got rows of {', '.join(map(str, sorted(lengths)))} numbers.")
    return torch.from_numpy(np.stack([np.asarray(row, np.float32) for row in rows]))


def reference_features(references: Any, reference_file: str | Path | None) -> Tensor:
    """The reference from its rows, or from a `FeatureSet` file.

    Raises:
        ValueError: If neither or both are given.
    """
    _check_one(references, reference_file)
    return to_tensor(references) if references is not None else FeatureSet.load(reference_file).features


def reference_statistics(references: Any, reference_file: str | Path | None) -> GaussianStatistics | Tensor:
    """As `reference_features`, but the file may be one of `GaussianStatistics`, too."""
    _check_one(references, reference_file)
    if references is not None:
        return to_tensor(references)
    try:
        return GaussianStatistics.load(reference_file)
    except ValueError:
        return FeatureSet.load(reference_file).features


def _check_one(references: Any, reference_file: str | Path | None) -> None:
    if references is None and reference_file is None:
        raise ValueError(f"compute() of the configuration {FROM_FILE!r} needs `reference_file`, a file of features.")
    if references is not None and reference_file is not None:
        raise ValueError(f'For a reference from a file, load the module with evaluate.load(path, "{FROM_FILE}").')
