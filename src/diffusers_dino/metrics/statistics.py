"""Mean and covariance of features that pass by: float64, constant memory, merged exactly, kept in files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import atomic_write
from .extractors import FeatureSpec
from .feature_sets import FeatureSet
from .inputs import Features, feature_matrix

__all__ = ["GaussianStatistics"]

_ROWS = 1024  # features that become float64 at once


class GaussianStatistics:
    """Number, mean and scatter of feature vectors, updated by pairwise formulas (Chan, Golub & LeVeque 1979).

    These do not subtract large sums from each other, so features far from zero lose no digits. Memory is that of a few
    D x D matrices, whatever the number of features.

    Args:
        dim: Width of the features, D.
        spec: How they were computed, if it is known; then other features are refused.

    Attributes:
        count: Number of features so far.
        mean: `(D,)` float64.
        scatter: `(D, D)` float64, the sum of outer products of what is left without the mean.
    """

    def __init__(self, dim: int, spec: FeatureSpec | None = None) -> None:
        if spec is not None and spec.dim != dim:
            raise ValueError(f"The description says {spec.dim} dimensions, the statistics shall have {dim}.")
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
        """`(D, D)` float64, unbiased.

        Raises:
            ValueError: If there are fewer than two features.
        """
        if self.count < 2:
            raise ValueError(f"A covariance needs two features at least, got {self.count}.")
        return self.scatter / (self.count - 1)

    def update(self, features: Features) -> GaussianStatistics:
        """Count features `(N, D)` in; N may be 0. Returns itself.

        Raises:
            ValueError: If they are of another width or extractor, or not finite.
        """
        if isinstance(features, FeatureSet) and self.spec is not None:
            self.spec.require_same(features.spec)
        matrix = feature_matrix(features, at_least=0)
        self._require_dim(matrix.shape[1])
        for rows in matrix.split(_ROWS):
            if not len(rows):
                continue
            rows = rows.double()  # (n, D)
            mean = rows.mean(dim=0)
            centred = rows - mean
            self._add(len(rows), mean, centred.T @ centred)
        return self

    def merge(self, other: GaussianStatistics) -> GaussianStatistics:
        """Count in what another one has seen, such as that of another process. Returns itself.

        Raises:
            ValueError: If the other one is of another width or extractor.
        """
        if self.spec is not None and other.spec is not None:
            self.spec.require_same(other.spec)
        self._require_dim(other.dim)
        self._add(other.count, other.mean, other.scatter)
        return self

    def save(self, path: str | Path) -> None:
        """Write one `.safetensors` file, whole or not at all.

        Raises:
            OSError: If the disk is full, or the folder is not writable.
        """
        tensors = {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}
        metadata = None if self.spec is None else {"spec": self.spec.to_json()}
        with atomic_write(path) as file:
            file.write(save(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> GaussianStatistics:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is another kind of file, or damaged.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                spec = (file.metadata() or {}).get("spec")
                statistics = cls(len(file.get_tensor("mean")), spec and FeatureSpec.from_json(spec))
                statistics.count = int(file.get_tensor("count"))
                statistics.mean, statistics.scatter = file.get_tensor("mean"), file.get_tensor("scatter")
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is not a file of statistics, or is damaged: {error}.") from error
        return statistics

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        if not count:
            return
        shift = mean - self.mean
        # (n1 n2 / n) d d^T is the scatter of the two means around the common one
        self.scatter.add_(scatter).addr_(shift, shift, alpha=self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def _require_dim(self, dim: int) -> None:
        if dim != self.dim:
            raise ValueError(f"Features of {dim} and of {self.dim} dimensions do not compare.")
