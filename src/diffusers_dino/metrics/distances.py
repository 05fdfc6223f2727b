"""Distances between two sets of feature vectors. Computed in float64 whatever the type of the features."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..tensor_files import read_tensors, refusing, write_tensors
from .extractors import FeatureSpec
from .features import Features, FeatureSet, comparable, feature_matrix

__all__ = [
    "GaussianStatistics",
    "frechet_distance",
    "frechet_of_samples",
    "kernel_blocks",
    "kernel_distance",
    "kernel_distance_of_subsets",
]

_KERNEL_ENTRIES = 1 << 22  # of the kernel matrix that are in memory at once
_ROWS = 1024  # features that become float64 at once


class GaussianStatistics:
    """Number, mean and scatter of feature vectors, updated by pairwise formulas (Chan, Golub & LeVeque 1979).

    These do not subtract large sums from each other, so features far from zero lose no digits. Memory is that of a few
    D x D matrices, whatever the number of features.

    Attributes:
        spec: How the features were computed, if it is known; then other features are refused.
        count: Number of features so far.
        mean: `(D,)` float64.
        scatter: `(D, D)` float64, the sum of outer products of the features less their mean.
    """

    def __init__(self, dim: int, spec: FeatureSpec | None = None) -> None:
        if spec is not None and spec.dim != dim:
            raise ValueError(f"The description says {spec.dim} dimensions, the statistics have {dim}.")
        self.spec = spec
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    @classmethod
    def of(cls, features: Features) -> GaussianStatistics:
        """Statistics of features `(N, D)`, N >= 1, with their description if they have one."""
        spec = features.spec if isinstance(features, FeatureSet) else None
        return cls(feature_matrix(features, at_least=1).shape[1], spec).update(features)

    @property
    def dim(self) -> int:
        """Width of the features."""
        return len(self.mean)

    @property
    def covariance(self) -> Tensor:
        """`(D, D)` float64, unbiased; ValueError if there are fewer than two features."""
        if self.count < 2:
            raise ValueError(f"A covariance needs two features at least, got {self.count}.")
        return self.scatter / (self.count - 1)

    def update(self, features: Features) -> GaussianStatistics:
        """Count features `(N, D)` in; N may be 0. Returns itself. ValueError if they do not fit, or are not finite."""
        matrix = feature_matrix(features, at_least=0)
        self.require_same(matrix.shape[1], features.spec if isinstance(features, FeatureSet) else None)
        for rows in matrix.split(_ROWS):
            if len(rows):
                rows = rows.double()  # (n, D)
                mean = rows.mean(dim=0)
                centred = rows - mean
                self._add(len(rows), mean, centred.T @ centred)
        return self

    def require_same(self, dim: int, spec: FeatureSpec | None) -> None:
        """Refuse features of another extractor or width; raises `ValueError` that names what differs."""
        if self.spec is not None and spec is not None:
            self.spec.require_same(spec)
        if dim != self.dim:
            raise ValueError(f"Features of {dim} and of {self.dim} dimensions do not compare.")

    def save(self, path: str | Path) -> None:
        """Write one `.safetensors` file, whole or not at all."""
        tensors = {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}
        write_tensors(path, tensors, {} if self.spec is None else {"spec": self.spec.to_dict()})

    @classmethod
    def load(cls, path: str | Path) -> GaussianStatistics:
        """Read what `save` wrote; ValueError if it is another kind of file, damaged, or was edited."""
        tensors, description = read_tensors(path, "a file of statistics", "count", "mean", "scatter")
        with refusing(path, "a file of statistics"):
            count, mean, scatter = (tensors[name] for name in ("count", "mean", "scatter"))
            if mean.ndim != 1 or scatter.shape != 2 * mean.shape or count.shape or count.dtype != torch.int64:
                raise ValueError(f"it holds arrays {tuple(count.shape)}, {tuple(mean.shape)}, {tuple(scatter.shape)}")
            for values in (mean, scatter):
                if values.dtype != torch.float64 or not values.isfinite().all():
                    raise ValueError("its numbers are not float64, or not finite")
            if count < 0 or (scatter.diagonal() < 0).any():
                raise ValueError("its numbers are not those of features")
            spec = FeatureSpec.from_dict(description["spec"]) if "spec" in description else None
            statistics = cls(len(mean), spec)
            statistics.count, statistics.mean, statistics.scatter = int(count), mean, scatter
        return statistics

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        shift = mean - self.mean
        # (n1 n2 / n) d d^T is the scatter of the two means around the common one
        self.scatter.add_(scatter).addr_(shift, shift, alpha=self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total


def frechet_distance(features: Features | GaussianStatistics, reference: Features | GaussianStatistics) -> float:
    r"""Fréchet distance of Gaussians fitted to two sets of features (Dowson & Landau 1982; FID, Heusel et al. 2017).

    .. math:: |\mu_1 - \mu_2|^2 + \operatorname{tr}(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2})

    It falls as sets grow (Chong & Forsyth 2020), so compare it only with figures of sets of the same two sizes. Sets
    that are not larger than the feature are warned of: their covariance is singular, and `kernel_distance` says more.

    Features are `(N, D)` and `(M, D)`, N and M >= 2, or their statistics. ValueError if the sets do not compare, or a
    feature is not finite.
    """
    if isinstance(features, GaussianStatistics) or isinstance(reference, GaussianStatistics):
        first, second = (
            x if isinstance(x, GaussianStatistics) else GaussianStatistics.of(x) for x in (features, reference)
        )
        first.require_same(second.dim, second.spec)
        _warn_of_few(first.count, second.count, first.dim)
        return frechet_of_statistics(first, second)
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
    values, vectors = torch.linalg.eigh(covariance_1)
    root_1 = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # tr (S1 S2)^(1/2) = tr (S1^(1/2) S2 S1^(1/2))^(1/2): the right side is symmetric, so its eigenvalues are real
    eigenvalues = torch.linalg.eigvalsh(root_1 @ covariance_2 @ root_1)
    cross = eigenvalues.clamp(min=0).sqrt().sum()
    shift = (first.mean - second.mean).square().sum()
    return max((shift + covariance_1.trace() + covariance_2.trace() - 2 * cross).item(), 0.0)


def kernel_distance(features: Features, reference: Features) -> float:
    r"""Squared maximum mean discrepancy with the kernel :math:`(x \cdot y / D + 1)^3` (KID, Binkowski et al. 2018).

    All pairs are used, a block at a time. Unbiased at any size, also far below the width of a feature; so it may be
    slightly negative for equal distributions. Sets and errors are those of `frechet_distance`, without statistics.
    """
    first, second = (x.double() for x in comparable(features, reference))

    def within(x: Tensor) -> Tensor:
        own = (x.square().sum(dim=1) / x.shape[1] + 1) ** 3  # the kernel of each feature with itself
        return (_kernel_sum(x, x) - own.sum()) / (len(x) * (len(x) - 1))

    across = _kernel_sum(first, second) / (len(first) * len(second))
    return (within(first) + within(second) - 2 * across).item()


def kernel_distance_of_subsets(
    features: Features, reference: Features, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID as published figures have it: mean and standard deviation over random subsets of both sets.

    `kernel_distance` has the same expectation and less noise. The deviation is that of one subset, not of the mean.
    Errors are those of `kernel_distance`; sets must not be smaller than the subsets.
    """
    pair = comparable(features, reference)
    smallest = min(map(len, pair))
    if not 2 <= subset_size <= smallest or num_subsets < 1:
        raise ValueError(
            f"Cannot draw {num_subsets} subsets of {subset_size} from sets of {len(pair[0])} and {len(pair[1])}: a "
            f"subset has 2 to {smallest} features here."
        )
    generator = torch.Generator().manual_seed(seed)
    draws = ([x[torch.randperm(len(x), generator=generator)[:subset_size]] for x in pair] for _ in range(num_subsets))
    values = torch.tensor([kernel_distance(*draw) for draw in draws], dtype=torch.float64)
    return values.mean().item(), values.std(correction=0).item()


def kernel_blocks(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of the kernel matrix `(n, m)` of `(n, D)` and `(m, D)`, with the slice of rows that each is of."""
    step = max(1, _KERNEL_ENTRIES // len(columns))
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        yield part, (rows[part] @ columns.T / rows.shape[1] + 1) ** 3


def _kernel_sum(rows: Tensor, columns: Tensor) -> Tensor:
    return torch.stack([block.sum() for _, block in kernel_blocks(rows, columns)]).sum()


def _scaled_samples(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(D,)`, and samples `(N, D)` whose Gram matrix over rows is the covariance."""
    features = features.double()
    mean = features.mean(dim=0)
    return mean, (features - mean) / (len(features) - 1) ** 0.5


def _warn_of_few(count: int, reference_count: int, dim: int) -> None:
    if min(count, reference_count) <= dim:
        warnings.warn(
            f"The Fréchet distance of {count} to {reference_count} features of {dim} dimensions rests on a singular "
            "covariance and is biased upwards: give both numbers and `kernel_distance` beside it.",
            stacklevel=3,
        )
