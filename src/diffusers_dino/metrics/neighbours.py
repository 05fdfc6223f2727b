"""Are generated images copies of training images? Distances to the nearest of them, and what distances mean.

A distance says nothing by itself: radiographs all resemble each other. So the distance to the nearest training image
is taken relative to that of the nearest tenth of the training images, and a threshold comes from real images that are
known not to be copies: those of other patients.

Wherever an image is compared it may be given in several views, such as itself and its mirror image: `(V, N, D)`. It is
then as near as its nearest view.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Groups",
    "Neighbors",
    "authenticity",
    "calibrate_threshold",
    "encode_groups",
    "evenly_spread",
    "nearest_by_cosine",
    "nearest_training",
    "relative_distances",
    "retrieval_accuracy",
    "typical_distances",
]

_TILE = 8192  # training images at once
_CHUNK = 256  # images at once
_CANDIDATES = 5  # for the nearest, whose order float32 may have wrong
_SAMPLE = 512  # training images that tell how dense they are
_NEAREST_SHARE = 0.1  # of them that count as near: copies of one image are fewer than that
_FEWEST = 11  # training images of which this share is more than one
_CONFIDENCE = 0.95  # that a threshold keeps its promise

Groups = Sequence[Hashable]


class Neighbors(NamedTuple):
    """The nearest training image of each of N images, and which view of the image is that near: each `(N,)`.

    Distances are float64; the others are int64.
    """

    distance: Tensor
    index: Tensor
    view: Tensor


def nearest_training(
    features: Tensor,
    training: Tensor,
    *,
    groups: Groups | None = None,
    training_groups: Groups | None = None,
) -> Neighbors:
    """The nearest training image of each image, by Euclidean distance of features.

    Candidates are found by matrix products in float32, a tile at a time, so that memory does not grow with N x M.
    Their distances are then computed one by one in float64, so that no answer depends on the other images.

    Args:
        features: `(N, D)`, or `(V, N, D)` for V views of each image.
        training: `(M, D)`.
        groups, training_groups: Group of each image, such as its patient; both or none. Images of one group are not
            compared, so a training image does not find itself or others of its patient.

    ValueError if shapes do not fit, a feature is not finite, or all training images are of an image's own group.
    """
    views = _views_of(features, training)
    codes, training_codes = encode_groups(groups, training_groups, views.shape[1], len(training))
    found = []
    for rows in _slices(views.shape[1], _CHUNK):
        own = None if codes is None else codes[rows]
        found.append(_settle(views[:, rows], training, _candidates(views[:, rows], training, own, training_codes)))
    distance, index, view = (torch.cat(parts) for parts in zip(*found, strict=True))
    if lonely := int((~distance.isfinite()).sum()):
        raise ValueError(f"{lonely} images have no training image of another group to be compared with.")
    return Neighbors(distance, index, view)


def typical_distances(
    features: Tensor,
    training: Tensor,
    *,
    groups: Groups | None = None,
    training_groups: Groups | None = None,
) -> Tensor:
    """How far the nearest tenth of the training images is from each image: `(N,)` float64.

    This is a measure of density that a few copies of an image within the training set do not change. It is taken on
    up to 512 training images, spread evenly over their order. Arguments and errors are those of `nearest_training`;
    it also takes 11 training images (of other groups).
    """
    views = _views_of(features, training)
    codes, training_codes = encode_groups(groups, training_groups, views.shape[1], len(training))
    chosen = evenly_spread(len(training), _SAMPLE)
    sample = training[chosen].double()
    distances = []
    for rows in _slices(views.shape[1], 4 * _CHUNK):  # the sample is small
        squared = _squared_distances(views[:, rows].double(), sample).amin(dim=0)  # (n, R)
        if codes is not None:
            squared.masked_fill_(codes[rows, None] == training_codes[None, chosen], torch.inf)
        available = squared.isfinite().sum(dim=1)
        if (available < _FEWEST).any():
            raise ValueError(
                f"At least {_FEWEST} training images (of other groups) are needed to tell how dense they are, got "
                f"{int(available.min())}."
            )
        ranks = (available * _NEAREST_SHARE).ceil().long() - 1
        distances.append(squared.sort(dim=1).values.gather(1, ranks[:, None])[:, 0].sqrt())
    return torch.cat(distances)


def evenly_spread(n: int, count: int) -> Tensor:
    """Numbers `(count,)` int64 of some of n items, evenly spread over their order; of all if there are no more."""
    return torch.linspace(0, n - 1, min(n, count)).round().long()


def relative_distances(neighbors: Neighbors, typical: Tensor) -> Tensor:
    """Distance to the nearest training image in units of `typical_distances`: `(N,)` float64 in [0, 1].

    0 is a copy; what is not nearer than the nearest tenth of the training images has 1.
    """
    nearest = neighbors.distance
    return torch.where(nearest > 0, nearest / typical.clamp(min=torch.finfo(torch.float64).tiny), 0.0).clamp(max=1)


def calibrate_threshold(real: Tensor, false_alarms: float = 0.01) -> float:
    """The relative distance below which an image counts as a copy, from real images that are not copies.

    With 95 % confidence at most a share of `false_alarms` of all real images that are drawn like the given ones fall
    below it: it is their largest order statistic that is a lower tolerance limit (Wilks 1941). That takes the
    distances for independent; several images of a patient are not, and weaken the promise. `real` `(n,)` are relative
    distances to training images of other patients; ValueError if they are too few for that, or if so many of them are
    copies that none could be told.
    """
    if real.ndim != 1 or not real.isfinite().all():
        raise ValueError(f"Expected finite distances (n,), got {tuple(real.shape)}, or NaN among them.")
    if not 0 < false_alarms < 1:
        raise ValueError(f"false_alarms is in (0, 1), got {false_alarms}.")
    rank = _tolerance_rank(len(real), false_alarms, 1 - _CONFIDENCE)
    if rank < 1:
        needed = math.ceil(math.log(1 - _CONFIDENCE) / math.log1p(-false_alarms))
        possible = 1 - (1 - _CONFIDENCE) ** (1 / max(len(real), 1))
        raise ValueError(
            f"{len(real)} real images are too few to promise at most {false_alarms:.2%} false alarms: it takes "
            f"{needed}. Give more images, or set false_alarms to {math.ceil(possible * 1e4) / 1e4:g} or more."
        )
    threshold = real.sort().values[rank - 1].item()
    if threshold <= 0:
        raise ValueError(
            f"{int((real == 0).sum())} of {len(real)} real images are exact copies of training images of other "
            "groups: leave duplicates out, or give the images of one patient one group."
        )
    return threshold


def authenticity(neighbors: Neighbors, spacing: Tensor) -> Tensor:
    """Whether each image is farther from its nearest training image than that is from its own nearest: `(N,)` bool.

    The mean over generated images is the AuthPct (Alaa et al., ICML 2022, section 4.3). It is a rate to be compared
    with that of real images, not a test of one image: in a sparse training set a third of unseen real images fail.
    `spacing` `(M,)` is the distance of each training image to the nearest other one.
    """
    return neighbors.distance > spacing[neighbors.index]


def nearest_by_cosine(queries: Tensor, gallery: Tensor) -> Tensor:
    """Index `(N,)` of the gallery item `(M, D)`, M >= 2, that is nearest to each query `(N, D)`.

    Nearness is the cosine of features centred on the gallery's mean. ValueError if the shapes do not fit.
    """
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1] or len(gallery) < 2:
        raise ValueError(
            f"Expected queries (N, D) and a gallery (M, D) with M >= 2, "
            f"got {tuple(queries.shape)} and {tuple(gallery.shape)}."
        )
    # One centre for both sides, so that a query's answer does not depend on the other queries
    center = gallery.float().mean(dim=0)
    similarity = F.normalize(queries.float() - center, dim=1) @ F.normalize(gallery.float() - center, dim=1).T
    return similarity.argmax(dim=1)


def retrieval_accuracy(queries: Tensor, gallery: Tensor) -> float:
    """Share of queries in [0, 1] whose nearest gallery item is their own source, item i being the source of query i.

    `queries` are features `(N, D)` of generated images, `gallery` those of the images they were generated from; chance
    is 1 / N, and the cosine that of `nearest_by_cosine`. ValueError if the shapes differ.
    """
    if len(queries) != len(gallery):
        raise ValueError(f"Each query needs its source: got {len(queries)} queries and {len(gallery)} sources.")
    hits = nearest_by_cosine(queries, gallery) == torch.arange(len(gallery), device=queries.device)
    return hits.float().mean().item()


def _tolerance_rank(n: int, share: float, risk: float) -> int:
    """The largest r for which fewer than r of n draws fall below the quantile `share` with probability <= `risk`."""
    total, rank = 0.0, 0
    while rank < n:
        log_ways = math.lgamma(n + 1) - math.lgamma(rank + 1) - math.lgamma(n - rank + 1)
        total += math.exp(log_ways + rank * math.log(share) + (n - rank) * math.log1p(-share))  # of exactly `rank`
        if total > risk:
            break
        rank += 1
    return rank


def _views_of(features: Tensor, training: Tensor) -> Tensor:
    """Checked features as `(V, N, D)`."""
    views = features[None] if features.ndim == 2 else features
    if views.ndim != 3 or training.ndim != 2 or views.shape[2] != training.shape[1]:
        raise ValueError(
            f"Expected features (N, D) or (V, N, D) and training features (M, D) of the same extractor, got "
            f"{tuple(features.shape)} and {tuple(training.shape)}."
        )
    if not views.numel() or not training.numel():
        raise ValueError(f"There is nothing to compare: {views.shape[1]} images and {len(training)} training images.")
    for name, values in (("features", views), ("training features", training)):
        if not all(torch.isfinite(part).all() for part in values.split(_TILE, dim=-2)):
            raise ValueError(f"The {name} hold NaN or infinite values.")
    return views


def encode_groups(
    groups: Groups | None, training_groups: Groups | None, n: int, m: int
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Groups as numbers, `(N,)` and `(M,)`; equal where the groups are."""
    if groups is None and training_groups is None:
        return None, None
    if groups is None or training_groups is None or (len(groups), len(training_groups)) != (n, m):
        lengths = [None if given is None else len(given) for given in (groups, training_groups)]
        raise ValueError(f"Give a group for each of {n} images and {m} training images, or none, got {lengths}.")
    numbers: dict[Hashable, int] = {}
    codes = [[numbers.setdefault(group, len(numbers)) for group in given] for given in (groups, training_groups)]
    return torch.tensor(codes[0]), torch.tensor(codes[1])


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, n)) for first in range(0, n, size))


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """`|x - y|^2 = |x|^2 + |y|^2 - 2 xy`, of `(..., n, D)` and `(m, D)`: `(..., n, m)`, up to rounding."""
    products = rows @ columns.T
    lengths = columns.square().sum(dim=1)
    return products.mul_(-2).add_(lengths).add_(rows.square().sum(dim=-1, keepdim=True)).clamp_(min=0)


def _candidates(views: Tensor, training: Tensor, codes: Tensor | None, training_codes: Tensor | None) -> Tensor:
    """Numbers `(n, K)` of the training images that are nearest to `(V, n, D)`, up to rounding; -1 for none."""
    center = training[:_TILE].float().mean(dim=0)  # of what all share only rounding errors would be left
    queries = views.float() - center
    best = queries.new_full((views.shape[1], 0), torch.inf)
    index = torch.empty((views.shape[1], 0), dtype=torch.long)
    for tile in _slices(len(training), _TILE):
        rows = training[tile].float() - center
        # one view after the other, so that a tile is in memory once
        squared = _squared_distances(queries[:1], rows)[0]
        for view in range(1, len(queries)):
            torch.minimum(squared, _squared_distances(queries[view : view + 1], rows)[0], out=squared)
        if codes is not None:
            squared.masked_fill_(codes[:, None] == training_codes[None, tile], torch.inf)
        near, number = squared.topk(min(_CANDIDATES, squared.shape[1]), largest=False)
        best, index = torch.cat([best, near], dim=1), torch.cat([index, number + tile.start], dim=1)
        best, kept = best.topk(min(_CANDIDATES, best.shape[1]), largest=False)
        index = index.gather(1, kept)
    return index.masked_fill(best.isinf(), -1)  # of the same group


def _settle(views: Tensor, training: Tensor, candidates: Tensor) -> Neighbors:
    """The nearest of the candidates `(n, K)` of `(V, n, D)`, by distances in float64."""
    chosen = training[candidates.clamp(min=0)].double()  # (n, K, D)
    exact = torch.stack([(chosen - view[:, None].double()).square().sum(dim=2) for view in views])  # (V, n, K)
    squared, view = exact.min(dim=0)
    squared = squared.masked_fill(candidates < 0, torch.inf)
    best = squared.sort(dim=1, stable=True).indices[:, :1]
    return Neighbors(*(x.gather(1, best)[:, 0] for x in (squared.sqrt(), candidates, view)))
