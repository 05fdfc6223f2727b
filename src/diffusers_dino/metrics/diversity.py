"""How many different images does a set hold, effectively?"""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import Features, feature_matrix

__all__ = ["vendi_score"]

_ROWS = 4096  # features that become float64 at once


def vendi_score(features: Features) -> float:
    r"""Vendi score (Friedman & Dieng 2023) with the cosine kernel: an effective number of distinct features.

    .. math:: \exp\Bigl(-\sum_i \lambda_i \log \lambda_i\Bigr)

    of the eigenvalues of K / N. It is 1 for equal features and N for orthogonal ones, and it grows with N: compare it
    with that of as many real images. The eigenvalues are taken of the smaller of the N x N and the D x D Gram matrix,
    which have the same.

    Args:
        features: `(N, D)`, N >= 1, no row of zeros.

    Raises:
        ValueError: If a feature is not finite, or has no direction.
    """
    matrix = feature_matrix(features, at_least=1)
    if len(matrix) <= matrix.shape[1]:
        directions = _directions(matrix)
        gram = directions @ directions.T  # (N, N)
    else:
        parts = (_directions(rows) for rows in matrix.split(_ROWS))
        gram = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)  # (D, D)
        for part in parts:
            gram.addmm_(part.T, part)
    eigenvalues = torch.linalg.eigvalsh(gram / len(matrix)).clamp(min=0)
    return torch.special.entr(eigenvalues).sum().exp().item()


def _directions(features: Tensor) -> Tensor:
    features = features.double()
    lengths = features.norm(dim=1, keepdim=True)
    if not (lengths > 0).all():
        raise ValueError(f"{int((lengths == 0).sum())} features are zero and have no direction: no cosine is defined.")
    return features / lengths
