"""Distances between two sets of feature vectors. Computed in float64 whatever the type of the features."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from .inputs import Features, comparable
from .statistics import GaussianStatistics

__all__ = ["KERNEL_DEGREE", "frechet_distance", "kernel_distance", "kernel_distance_of_subsets"]

KERNEL_DEGREE = 3
_KERNEL_ENTRIES = 1 << 22  # of the kernel matrix that are in memory at once


def frechet_distance(features: Features | GaussianStatistics, reference: Features | GaussianStatistics) -> float:
    r"""Fréchet distance of Gaussians fitted to two sets of features (Dowson & Landau 1982; FID, Heusel et al. 2017).

    .. math:: |\mu_1 - \mu_2|^2 + \operatorname{tr}(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2})

    It falls as sets grow (Chong & Forsyth 2020), so it compares with figures of the same two sizes alone. Sets that
    are not larger than the feature are warned of: their covariance is singular, and `kernel_distance` says more.

    Args:
        features: `(N, D)`, N >= 2, or their statistics.
        reference: `(M, D)`, M >= 2, or their statistics.

    Raises:
        ValueError: If the sets do not compare, or a feature is not finite.
    """
    if isinstance(features, GaussianStatistics) or isinstance(reference, GaussianStatistics):
        pair = tuple(
            x if isinstance(x, GaussianStatistics) else GaussianStatistics.of(x) for x in (features, reference)
        )
        _check_statistics(*pair)
        _warn_of_few(pair[0].count, pair[1].count, pair[0].dim)
        return frechet_of_statistics(*pair)
    pair = comparable(features, reference)
    _warn_of_few(len(pair[0]), len(pair[1]), pair[0].shape[1])
    return frechet_of_samples(*pair)


def frechet_of_samples(features: Tensor, reference: Tensor) -> float:
    """`frechet_distance` of `(N, D)` and `(M, D)` without checks or a warning."""
    if min(len(features), len(reference)) > features.shape[1]:
        return frechet_of_statistics(GaussianStatistics.of(features), GaussianStatistics.of(reference))
    # With S = A^T A of the scaled, centred samples, tr (S1 S2)^(1/2) is the sum of the singular values of A1 A2^T,
    # which is N x M: far smaller than D x D where samples are few
    (mean_1, samples_1), (mean_2, samples_2) = _scaled_samples(features), _scaled_samples(reference)
    cross = torch.linalg.svdvals(samples_1 @ samples_2.T).sum()
    spread = samples_1.square().sum() + samples_2.square().sum()
    return max(((mean_1 - mean_2).square().sum() + spread - 2 * cross).item(), 0.0)


def frechet_of_statistics(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """`frechet_distance` of statistics without checks or a warning."""
    covariance_1, covariance_2 = first.covariance, second.covariance
    root_1 = _symmetric_root(covariance_1)
    # tr (S1 S2)^(1/2) = tr (S1^(1/2) S2 S1^(1/2))^(1/2): the right side is symmetric, so its eigenvalues are real
    eigenvalues = torch.linalg.eigvalsh(root_1 @ covariance_2 @ root_1)
    cross = eigenvalues.clamp(min=0).sqrt().sum()
    shift = (first.mean - second.mean).square().sum()
    return max((shift + covariance_1.trace() + covariance_2.trace() - 2 * cross).item(), 0.0)


def kernel_distance(features: Features, reference: Features) -> float:
    r"""Squared maximum mean discrepancy with the kernel :math:`(x \cdot y / D + 1)^3` (KID, Binkowski et al. 2018).

    All pairs are used, a block at a time. Unbiased at any size, also far below the width of a feature; so it may be
    slightly negative for equal distributions.

    Args:
        features: `(N, D)`, N >= 2.
        reference: `(M, D)`, M >= 2.

    Raises:
        ValueError: If the sets do not compare, or a feature is not finite.
    """
    first, second = (x.double() for x in comparable(features, reference))
    n, m = len(first), len(second)
    within = (_kernel_sum(x, x) - _kernel_diagonal(x).sum() for x in (first, second))
    within_1, within_2 = (total / (size * (size - 1)) for total, size in zip(within, (n, m), strict=True))
    return (within_1 + within_2 - 2 * _kernel_sum(first, second) / (n * m)).item()


def kernel_distance_of_subsets(
    features: Features, reference: Features, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID as published figures have it: mean and standard deviation over random subsets of both sets.

    `kernel_distance` has the same expectation and less noise. The deviation is that of one subset, not of the mean.

    Args:
        features: `(N, D)`, N >= `subset_size`.
        reference: `(M, D)`, M >= `subset_size`.
        num_subsets: Number of pairs of subsets.
        subset_size: Features in each.
        seed: Of the subsets.

    Raises:
        ValueError: As `kernel_distance`, or if a set is smaller than the subsets.
    """
    pair = comparable(features, reference)
    smallest = min(map(len, pair))
    if not 2 <= subset_size <= smallest or num_subsets < 1:
        raise ValueError(
            f"Cannot draw {num_subsets} subsets of {subset_size} from sets of {len(pair[0])} and {len(pair[1])}: a "
            f"subset has 2 to {smallest} features here."
        )
    generator = torch.Generator().manual_seed(seed)
    draws = [[x[torch.randperm(len(x), generator=generator)[:subset_size]] for x in pair] for _ in range(num_subsets)]
    values = torch.tensor([kernel_distance(*draw) for draw in draws], dtype=torch.float64)
    return values.mean().item(), values.std(correction=0).item()


def polynomial_kernel(rows: Tensor, columns: Tensor) -> Tensor:
    """`(n, m)` of `(n, D)` and `(m, D)`."""
    return (rows @ columns.T / rows.shape[1] + 1) ** KERNEL_DEGREE


def kernel_blocks(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of the kernel matrix `(n, m)`, with the slice of rows that each is of."""
    step = max(1, _KERNEL_ENTRIES // len(columns))
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        yield part, polynomial_kernel(rows[part], columns)


def _kernel_sum(rows: Tensor, columns: Tensor) -> Tensor:
    return torch.stack([block.sum() for _, block in kernel_blocks(rows, columns)]).sum()


def _kernel_diagonal(rows: Tensor) -> Tensor:
    """`(n,)`, the kernel of each row with itself."""
    return (rows.square().sum(dim=1) / rows.shape[1] + 1) ** KERNEL_DEGREE


def _scaled_samples(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(D,)`, and samples `(N, D)` whose Gram matrix over rows is the covariance."""
    features = features.double()
    mean = features.mean(dim=0)
    return mean, (features - mean) / (len(features) - 1) ** 0.5


def _symmetric_root(matrix: Tensor) -> Tensor:
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    return (eigenvectors * eigenvalues.clamp(min=0).sqrt()) @ eigenvectors.T


def _check_statistics(first: GaussianStatistics, second: GaussianStatistics) -> None:
    if first.spec is not None and second.spec is not None:
        first.spec.require_same(second.spec)
    if first.dim != second.dim:
        raise ValueError(f"Features of {first.dim} and of {second.dim} dimensions do not compare.")


def _warn_of_few(count: int, reference_count: int, dim: int) -> None:
    if min(count, reference_count) <= dim:
        warnings.warn(
            f"The Fréchet distance of {count} to {reference_count} features of {dim} dimensions rests on a singular "
            "covariance and is biased upwards: give both numbers and `kernel_distance` beside it.",
            stacklevel=3,
        )
