"""DiffSeg as its authors published it, transcribed to float64, and attention maps to compare on.

The steps and their order are those of `diffseg/segmentor.py` of the authors' repository: divergences by their
definition, a set of matched maps, scikit-learn's k-means, upsampling and argmax. Where the published code computes in
float16 and is tied to 64 positions and 512 pixels, this one is float64 and takes the sizes from its input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.cluster import KMeans
from torch import Tensor

ROWS = 128


def structured_attention(
    sides: Sequence[int] = (64, 32, 16, 8),
    heads: int = 2,
    segments: int = 6,
    contrast: float = 4.0,
    locality: float = 2.0,
    seed: int = 0,
) -> dict[int, Tensor]:
    """Self-attention that prefers keys of the query's own segment and near it, `(heads, s * s, s * s)` for each side.

    Segments are Voronoi cells, the same at each side; heads differ by noise.
    """
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(segments, 2, generator=generator)
    attention = {}
    for side in sides:
        grid = (torch.arange(side) + 0.5) / side
        positions = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), dim=-1).view(-1, 2)
        cell = torch.cdist(positions, centers).argmin(dim=1)
        scores = contrast * (cell[:, None] == cell).float() - locality * torch.cdist(positions, positions)
        attention[side] = torch.stack(
            [(scores + torch.randn(side**2, side**2, generator=generator)).softmax(dim=-1) for _ in range(heads)]
        )
    return attention


def published_aggregate(attention: dict[int, Tensor]) -> Tensor:
    """`{s: (heads * layers, s * s, s * s)}` to `(size * size, size, size)` float64, weighted in proportion to s."""
    size = max(attention)
    total = torch.zeros(size, size, size, size, dtype=torch.float64)
    for side, maps in attention.items():
        mean = maps.double().mean(dim=0).view(-1, 1, side, side)
        keys = torch.nn.functional.interpolate(mean, scale_factor=size // side, mode="bilinear")[:, 0]
        keys = (keys / keys.sum(dim=(1, 2), keepdim=True)).view(side, side, size, size)
        queries = keys.repeat_interleave(size // side, dim=0).repeat_interleave(size // side, dim=1)
        total += side / sum(attention) * queries
    return total.view(size * size, size, size)


def published_divergences(anchors: Tensor, maps: Tensor) -> Tensor:
    """`(KL(x, y) + KL(y, x)) / 2` of `(A, D)` and `(N, D)` float64 by its definition: `(A, N)`."""
    result = anchors.new_empty(len(anchors), len(maps))
    log_anchors, log_maps = anchors.log(), maps.log()
    for start in range(0, len(maps), ROWS):
        rows = slice(start, start + ROWS)
        for i in range(len(anchors)):
            quotient = log_maps[rows] - log_anchors[i]
            result[i, rows] = quotient.mul_(maps[rows] - anchors[i]).sum(dim=1) / 2
    return result


def published_anchors(size: int, per_side: int) -> list[int]:
    segment = (size - 1) // (per_side - 1)
    start = (size - 1 - segment * (per_side - 1)) // 2
    line = [start + segment * i for i in range(per_side)]
    return [row * size + column for row in line for column in line]


def published_merge(
    maps: Tensor, thresholds: Sequence[float], per_side: int = 16, divergences: Tensor | None = None
) -> Tensor:
    """`(size * size, size, size)` float64 to `(K, size, size)`; `divergences` of the anchors may be given."""
    size = maps.shape[-1]
    flat = maps.reshape(size * size, size * size)
    if divergences is None:
        divergences = published_divergences(flat[published_anchors(size, per_side)], flat)
    near = (divergences < thresholds[0]).double()
    merged = near @ flat / near.sum(dim=1, keepdim=True)
    for threshold in thresholds[1:]:
        matched, kept = set(), []
        for i in range(len(merged)):
            if i in matched:
                continue
            matched.add(i)
            near = published_divergences(merged[i : i + 1], merged)[0] < threshold
            if near.any():
                matched.update(torch.nonzero(near).flatten().tolist())
                kept.append(merged[near].mean(dim=0))
        merged = torch.stack(kept)
    return merged.view(-1, size, size)


def published_refine(maps: Tensor, merged: Tensor) -> Tensor:
    """k-means over all maps, started from the merged ones: `(K, size, size)` float64."""
    flat = maps.flatten(1)
    start = merged.flatten(1).numpy()
    labels = KMeans(n_clusters=len(start), init=start, n_init=1).fit(flat.numpy()).labels_
    means = [flat[torch.from_numpy(labels == i)].mean(dim=0) for i in range(len(set(labels)))]
    return torch.stack(means).view(-1, *maps.shape[1:])


def published_mask(merged: Tensor, size: int) -> Tensor:
    """`(K, s, s)` to `(size, size)`: the candidate with the largest value after upsampling."""
    return torch.nn.functional.interpolate(merged[None], size=(size, size), mode="bilinear")[0].argmax(dim=0)
