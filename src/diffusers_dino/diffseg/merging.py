"""DiffSeg's arithmetic: self-attention maps of a diffusion model -> segments, without training or labels.

Tian et al., "Diffuse, Attend, and Segment" (CVPR 2024), section 3. An attention map is a probability distribution over
the positions of a square; distances between maps are matrix products. Sums over all maps are float32, the later passes
over the few that are left float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..extras import require

__all__ = [
    "aggregate_attention",
    "anchor_divergence",
    "anchor_positions",
    "merge_attention",
    "pairwise_kl",
    "refine_segments",
    "relative_thresholds",
    "suppress",
]

_SUM_ERROR = 1e-3  # what half precision and averaging may leave
_ROWS_AT_ONCE = 512
_SUPPRESSED_AT_ONCE = 16
_SUPPRESSED_PIXELS = 2**26  # of all candidates at once: 256 MiB
_LEAST_THRESHOLD = 1e-9  # nats: far above what rounding makes of equal maps, far below any model's differences


def aggregate_attention(attention: Mapping[int, Tensor], weights: Mapping[int, float] | None = None) -> Tensor:
    """Combine the self-attention of all resolutions into one map for each position (section 3.2).

    Maps are averaged over heads and layers of one resolution; the axis of keys is upsampled bilinearly to the largest
    one and renormalised to sum 1, the axis of queries is repeated.

    Args:
        attention: Maps `(heads * layers, s * s, s * s)`, queries by keys, for each side length s.
        weights: Weight of each resolution, 0 or more, scaled to sum 1; by default proportional to s.

    Returns:
        `(size * size, size, size)` float32, each map of sum 1, of the largest s.
    """
    if not attention:
        raise ValueError("There are no attention maps to aggregate.")
    weights = {side: float(side) for side in attention} if weights is None else weights
    _check_attention(attention, weights)
    size = max(attention)
    total = sum(weights[side] for side in attention)
    device = next(iter(attention.values())).device
    result = torch.zeros(size, size, size, size, device=device)  # (rows, columns) of queries, then of keys
    for side, maps in attention.items():
        keys = maps.float().mean(dim=0).view(-1, 1, side, side)
        if side != size:
            keys = F.interpolate(keys, size=(size, size), mode="bilinear")
        keys = keys.squeeze(1)  # (s * s, size, size)
        scale = weights[side] / total / keys.sum(dim=(-2, -1), keepdim=True)
        nearest = torch.arange(size, device=device) * side // size
        for row in range(size):  # by rows of queries, so that no repeated copy of all maps is held
            queries = nearest[row] * side + nearest
            result[row].addcmul_(keys[queries], scale[queries])
    return result.view(size * size, size, size)


def merge_attention(
    maps: Tensor, thresholds: Sequence[float], anchors_per_side: int = 16, divergence: Tensor | None = None
) -> Tensor:
    """Merge similar maps into candidate segments (section 3.3).

    First pass: each anchor of a regular grid averages all maps within the threshold. Each later pass goes through the
    candidates in order; one that no earlier one has taken averages all candidates within the threshold. Similarity is
    the symmetric Kullback-Leibler divergence, `(KL(x, y) + KL(y, x)) / 2`, in nats.

    Args:
        maps: `(size * size, size, size)`, as `aggregate_attention` gives them; a ValueError if their sums are not 1.
        thresholds: One a pass, each positive; an infinite one merges all.
        anchors_per_side: Anchors along each side, from 1 to size.
        divergence: What `anchor_divergence` gives for these maps and anchors, so that merging them again with other
            thresholds does not compute it again.

    Returns:
        `(K, size, size)` float32, K >= 1.
    """
    flat = _flat(maps)
    if not len(thresholds) or not all(threshold > 0 for threshold in thresholds):
        raise ValueError(f"Each pass needs a threshold above 0, got {list(thresholds)}.")
    anchors = anchor_positions(maps.shape[-1], anchors_per_side, flat.device)
    divergence = pairwise_kl(flat[anchors], flat) if divergence is None else divergence
    if divergence.shape != (len(anchors), len(flat)):
        raise ValueError(
            f"`divergence` must be {(len(anchors), len(flat))}, anchors by maps, got {tuple(divergence.shape)}."
        )
    within = divergence < thresholds[0]  # (A, N)
    within[torch.arange(len(anchors)), anchors] = True  # a map is like itself, whatever rounding says
    precise = torch.float32 if flat.device.type == "mps" else torch.float64  # which MPS lacks
    merged = average(flat, within).to(precise)  # few from here on: precision costs nothing
    for threshold in thresholds[1:]:
        within = pairwise_kl(merged, merged) < threshold
        within.fill_diagonal_(True)
        merged = average(merged, within[_greedy_order(within)])
    return merged.float().view(-1, *maps.shape[1:])


def anchor_divergence(maps: Tensor, anchors_per_side: int = 16) -> Tensor:
    """Divergence between the maps of a grid of anchors and all maps, for several calls of `merge_attention`.

    Arguments are as there; the result is `(anchors_per_side ** 2, size * size)` float32, in nats.
    """
    flat = _flat(maps)
    return pairwise_kl(flat[anchor_positions(maps.shape[-1], anchors_per_side, flat.device)], flat)


def relative_thresholds(maps: Tensor, fractions: Sequence[float]) -> list[float]:
    r"""Thresholds for `merge_attention` in units of the mean divergence between all pairs of an image's maps.

    That mean is :math:`\sum_d \mathrm{cov}(p_d, \log p_d)` over the maps p, one pass instead of all pairs.
    `fractions` has one positive number a pass; thresholds are in nats, and never quite 0: equal maps are merged.
    """
    flat = _flat(maps)
    log = flat.clamp(min=torch.finfo(torch.float32).tiny).log()
    mean = float(((flat - flat.mean(dim=0)) * log).mean(dim=0).sum())
    return [fraction * max(mean, _LEAST_THRESHOLD) for fraction in fractions]


def refine_segments(maps: Tensor, merged: Tensor) -> Tensor:
    """Refine candidates by k-means over all maps, started from them (DiffSeg's optional step).

    Args:
        maps: `(size * size, size, size)`.
        merged: `(K, size, size)`.

    Returns:
        `(K', size, size)`, K' <= K: the mean map of each cluster that is not empty.
    """
    cluster = require("sklearn.cluster", "eval", "Refinement needs scikit-learn")
    flat = maps.flatten(1).float().cpu()
    start = merged.flatten(1).float().cpu()
    clusters = cluster.KMeans(len(start), init=start.numpy(), n_init=1).fit(flat.numpy())
    labels = torch.from_numpy(clusters.labels_).long()
    members = F.one_hot(labels, len(start)).T.bool()  # (K, N)
    return average(flat, members[members.any(dim=1)]).view(-1, *maps.shape[1:]).to(maps.device)


def suppress(merged: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Give each pixel to the candidate with the largest value there (non-maximum suppression, section 3.4).

    Candidates are `(K, h, w)`, the result `(H, W)` int64 in [0, K); `size` is H and W, or the side of a square.
    """
    height_width = (size, size) if isinstance(size, int) else tuple(size)
    count = max(1, min(_SUPPRESSED_AT_ONCE, _SUPPRESSED_PIXELS // (height_width[0] * height_width[1])))
    best = torch.full(height_width, -torch.inf, device=merged.device)
    labels = torch.zeros(height_width, dtype=torch.int16, device=merged.device)
    for start in range(0, len(merged), count):
        chunk = merged[None, start : start + count].float()
        for label, value in enumerate(F.interpolate(chunk, size=height_width, mode="bilinear")[0], start):  # (H, W)
            labels.masked_fill_(value > best, label)
            torch.maximum(best, value, out=best)
    return labels.long()


def pairwise_kl(x: Tensor, y: Tensor) -> Tensor:
    r"""Symmetric Kullback-Leibler divergence of distributions `(A, D)` and `(B, D)` of sum 1: `(A, B)`, in nats.

    With :math:`H(p) = \sum p \log p` it is :math:`\tfrac12 [H(x) + H(y) - x \cdot \log y - y \cdot \log x]`: two
    matrix products instead of `A * B * D` terms at once. Any vector may be subtracted from all logarithms; the mean of
    x's makes them as small as the distributions are alike, and rounding with them.
    """
    tiny = torch.finfo(torch.float32).tiny
    log_x = x.clamp(min=tiny).log_()
    center = log_x.mean(dim=0)
    log_x -= center
    own_x = (x * log_x).sum(dim=1)[:, None]
    result = x.new_empty(len(x), len(y))
    for start in range(0, len(y), _ROWS_AT_ONCE):  # in pieces that stay in the processor's cache
        rows = slice(start, start + _ROWS_AT_ONCE)
        log_y = y[rows].clamp(min=tiny).log_().sub_(center)
        own_y = (y[rows] * log_y).sum(dim=1)
        result[:, rows] = own_x + own_y - x @ log_y.T - log_x @ y[rows].T
    return result.div_(2)


def anchor_positions(size: int, per_side: int, device: torch.device | str = "cpu") -> Tensor:
    """Indices into `size * size` positions of a regular, centred grid: 1, 5, ..., 61 along a side of 64 for 16."""
    if not 1 <= per_side <= size:
        raise ValueError(f"There must be 1 to {size} anchors a side, got {per_side}.")
    step = (size - 1) // (per_side - 1) if per_side > 1 else 0
    start = (size - 1 - step * (per_side - 1)) // 2
    line = start + step * torch.arange(per_side, device=device)
    return (line[:, None] * size + line).flatten()


def _flat(maps: Tensor) -> Tensor:
    """Maps `(size * size, size, size)` as rows `(size * size, size * size)` float32."""
    size = maps.shape[-1]
    if maps.shape != (size * size, size, size):
        raise ValueError(f"Expected maps (size * size, size, size), got {tuple(maps.shape)}.")
    flat = maps.reshape(size * size, size * size).float()
    if not bool((flat.sum(dim=1) - 1).abs().max() < _SUM_ERROR):  # also refuses NaN
        raise ValueError("Each map must be a distribution of sum 1, as `aggregate_attention` gives them.")
    return flat


def average(maps: Tensor, members: Tensor) -> Tensor:
    """Mean of the maps `(N, D)` in each group `(G, N)`, of 0 and 1: `(G, D)`."""
    members = members.to(maps.dtype)
    return members @ maps / members.sum(dim=1, keepdim=True)


def _greedy_order(within: Tensor) -> list[int]:
    """Candidates that no earlier candidate has taken, in order."""
    neighbors = within.cpu()
    taken = torch.zeros(len(neighbors), dtype=torch.bool)
    order = []
    for candidate in range(len(neighbors)):
        if not taken[candidate]:
            order.append(candidate)
            taken |= neighbors[candidate]
    return order


def _check_attention(attention: Mapping[int, Tensor], weights: Mapping[int, float]) -> None:
    for side, maps in attention.items():
        if maps.ndim != 3 or maps.shape[1:] != (side * side, side * side):
            raise ValueError(
                f"Maps of side {side} must be (n, {side * side}, {side * side}), got {tuple(maps.shape)}."
            )
        if side not in weights or not (math.isfinite(weights[side]) and weights[side] >= 0):
            raise ValueError(f"Side {side} needs a weight of 0 or more, got {weights.get(side)}.")
    if sum(weights[side] for side in attention) <= 0:
        raise ValueError("At least one weight must be above 0.")
