"""Segments by recursive normalised cuts of a graph of an image's patches, without a number of segments to choose.

Shi and Malik, "Normalized Cuts and Image Segmentation" (2000). How alike two patches are is told by their features, as
in DiffCut (Couairon et al., arXiv 2406.02842), or by a random walk on self-attention maps ("Unsupervised Segmentation
by Diffusing, Walking and Cutting", arXiv 2412.04678).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .features import centered
from .merging import average

__all__ = ["cut_features", "feature_affinity", "mean_maps", "recursive_cut", "walk_affinity"]

_AT_MOST = 4096  # patches: the affinities of more take a minute to decompose
_SPLITS = 32  # of the sorted eigenvector that are tried
_SMALLEST = 0.01  # share of the image's patches that a segment keeps at least


def feature_affinity(features: Tensor, power: float = 4.0) -> Tensor:
    """Affinities `(N, N)` in [0, 1] of an image's features `(D, h, w)`: cosines of 0 or more, to a power.

    The power (DiffCut's alpha, 10 there) sharpens them. Features are centred over the image before, so that a lower
    one is enough.
    """
    unit = F.normalize(centered(features[None])[0].flatten(1).float(), dim=0)
    return (unit.T @ unit).clamp(0, 1) ** power


def walk_affinity(maps: Tensor, steps: int = 2) -> Tensor:
    """Affinities `(N, N)` of an image's attention maps `(s * s, s, s)`: two patches' chance to meet in a random walk.

    Rows of attention are a walker's chances to go from a patch to others; `steps` is the power of that matrix. The
    result is symmetrised.
    """
    walked = torch.linalg.matrix_power(maps.flatten(1).float(), steps)
    return (walked + walked.T) / 2


def recursive_cut(affinity: Tensor, threshold: float) -> Tensor:
    """Segments `(N,)` int64 of a graph of symmetric affinities `(N, N)` of 0 or more.

    A part is cut in two where the normalised cut is smallest, along the second eigenvector of its normalised
    affinities, and again, until the cut would cost more than `threshold`, in [0, 2]: higher gives more segments.
    """
    count = len(affinity)
    if affinity.shape != (count, count) or not 1 <= count <= _AT_MOST:
        raise ValueError(f"Expected affinities (N, N) of 1 to {_AT_MOST} patches, got {tuple(affinity.shape)}.")
    if not 0 < threshold <= 2:
        raise ValueError(f"The threshold of a cut is above 0 and at most 2, got {threshold}.")
    device = affinity.device
    affinity = affinity.cpu() if device.type == "mps" else affinity  # which lacks the precision that sums need
    least = max(1, round(_SMALLEST * count))
    segments = torch.zeros(count, dtype=torch.int64, device=affinity.device)
    waiting, found = [torch.arange(count, device=affinity.device)], 0
    while waiting:
        part = waiting.pop()
        cost, first = _best_cut(affinity[part][:, part], least)
        if cost < threshold:
            waiting += [part[~first], part[first]]
        else:
            segments[part] = found
            found += 1
    return segments.to(device)


def cut_features(features: Tensor, threshold: float, power: float = 4.0) -> Tensor:
    """Segments of one image's features `(D, h, w)`, as maps `(K, h, w)`: each patch's cosine with each segment's mean.

    DiffCut assigns pixels by these, once they are upsampled, which gives finer outlines than the patches have.
    """
    segments = recursive_cut(feature_affinity(features, power), threshold)
    flat = centered(features[None])[0].flatten(1).float()  # (D, N)
    means = average(flat.T, F.one_hot(segments).T)  # (K, D)
    return (F.normalize(means, dim=1) @ F.normalize(flat, dim=0)).unflatten(1, features.shape[1:])


def mean_maps(maps: Tensor, segments: Tensor) -> Tensor:
    """The mean `(K, s, s)` of attention maps `(s * s, s, s)` over each of K segments `(s * s,)`."""
    return average(maps.flatten(1).float(), F.one_hot(segments).T).unflatten(1, maps.shape[1:])


def _best_cut(affinity: Tensor, least: int) -> tuple[float, Tensor]:
    """The smallest normalised cut into two parts of `least` patches or more, and which patches are the first part."""
    count = len(affinity)
    nowhere = torch.zeros(count, dtype=torch.bool, device=affinity.device)
    if count < 2 * least or count < 2:
        return float("inf"), nowhere
    degree = affinity.sum(dim=1).clamp(min=1e-12)
    scale = degree.rsqrt()
    vectors = torch.linalg.eigh(scale[:, None] * affinity * scale)[1]
    order = (vectors[:, -2] * scale).argsort()
    # With patches in this order, what lies between the first n and the others is a difference of running sums.
    ordered = affinity[order][:, order].double()
    volume = ordered.sum(dim=1).cumsum(0)
    inside = ordered.cumsum(0).cumsum(1).diagonal()
    between = (volume - inside).clamp(min=0)
    costs = between / volume.clamp(min=1e-12) + between / (volume[-1] - volume).clamp(min=1e-12)  # of the first n + 1
    tried = torch.linspace(least - 1, count - least - 1, min(_SPLITS, count - 2 * least + 1), device=costs.device)
    tried = tried.round().long()
    best = int(tried[costs[tried].argmin()])
    first = nowhere.clone()
    first[order[: best + 1]] = True
    return float(costs[best]), first
