"""What the figures accept: features as tensors, or as sets that know their extractor."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from .feature_sets import FeatureSet

__all__ = ["Features", "comparable", "feature_matrix"]

Features: TypeAlias = Tensor | FeatureSet


def feature_matrix(features: Features, name: str = "features", at_least: int = 2) -> Tensor:
    """Checked features `(N, D)` on the CPU, in the type that they came in.

    Raises:
        ValueError: If they are no matrix, fewer than `at_least`, or not finite.
    """
    matrix = features.features if isinstance(features, FeatureSet) else features
    if not isinstance(matrix, Tensor) or matrix.ndim != 2 or len(matrix) < at_least or not matrix.shape[1]:
        found = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(f"`{name}` must be a tensor (N, D) with N >= {at_least}, got {found}.")
    if not torch.isfinite(matrix).all():
        raise ValueError(f"`{name}` holds NaN or infinite values.")
    return matrix.detach().cpu()  # float64 is not to be had on every device


def comparable(features: Features, reference: Features, at_least: int = 2) -> tuple[Tensor, Tensor]:
    """Both sets as checked matrices `(N, D)` and `(M, D)`.

    Raises:
        ValueError: As `feature_matrix`, or if they are of different extractors or widths.
    """
    if isinstance(features, FeatureSet) and isinstance(reference, FeatureSet):
        features.require_same_spec(reference)
    pair = feature_matrix(features, "features", at_least), feature_matrix(reference, "reference", at_least)
    if pair[0].shape[1] != pair[1].shape[1]:
        raise ValueError(f"Features of {pair[0].shape[1]} and of {pair[1].shape[1]} dimensions do not compare.")
    return pair
