"""Distances between two sets of feature vectors. Statistics and results are float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["frechet_distance"]


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    r"""Fréchet distance of Gaussians fitted to two sets of features (Dowson & Landau 1982; FID, Heusel et al. 2017).

    .. math:: |\mu_1 - \mu_2|^2 + \operatorname{tr}(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2})

    With fewer samples than dimensions the covariances are singular and the figure is biased upwards: compare it only
    with figures of the same two sample sizes, and give them beside it.

    Args:
        features: `(N, D)`, N >= 2.
        reference: `(M, D)`, M >= 2.

    Raises:
        ValueError: The shapes do not fit, or a feature is not finite.
    """
    _check_features(features, reference)
    mean_1, covariance_1 = _gaussian(features)
    mean_2, covariance_2 = _gaussian(reference)
    root_1 = _symmetric_root(covariance_1)
    # tr (S1 S2)^(1/2) = tr (S1^(1/2) S2 S1^(1/2))^(1/2): the right side is symmetric, so its eigenvalues are real
    eigenvalues = torch.linalg.eigvalsh(root_1 @ covariance_2 @ root_1)
    cross = eigenvalues.clamp(min=0).sqrt().sum()
    distance = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace() - 2 * cross
    return max(distance.item(), 0.0)


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.double()
    return features.mean(dim=0), torch.cov(features.T).reshape(features.shape[1], features.shape[1])


def _symmetric_root(matrix: Tensor) -> Tensor:
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    return (eigenvectors * eigenvalues.clamp(min=0).sqrt()) @ eigenvectors.T


def _check_features(features: Tensor, reference: Tensor) -> None:
    for name, value in (("features", features), ("reference", reference)):
        if value.ndim != 2 or len(value) < 2:
            raise ValueError(f"`{name}` must be (N, D) with N >= 2, got {tuple(value.shape)}.")
        if not torch.isfinite(value).all():
            raise ValueError(f"`{name}` holds NaN or infinite values.")
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"Features of {features.shape[1]} and of {reference.shape[1]} dimensions do not compare.")
