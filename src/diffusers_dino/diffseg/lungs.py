"""Choose lungs among segments, and the settings of DiffSeg for each image, without looking at any reference mask.

`name_lungs` chooses segments, `most_agreed` the setting of a sweep whose lungs are stable against the choice of
timestep and threshold. The prior is two upright ellipses in the upper two thirds of a frontal chest radiograph, in
round numbers that were written by hand and not fitted. It decides which segments are named; their outline is the
segments' own. Anything that is chosen with it must be compared with the prior by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .clusters import FeatureClusters, fit_clusters

__all__ = [
    "NamedSegments",
    "fit_lung_clusters",
    "lung_prior",
    "most_agreed",
    "name_lung_clusters",
    "name_lungs",
    "union_table",
]


# Upright ellipses: x and y of the centre from the top left, and both semi-axes, in units of the image's side
_ELLIPSES = ((0.28, 0.45, 0.18, 0.34), (0.72, 0.45, 0.18, 0.34))
_DARKNESS = 0.1  # weight of a standard deviation of brightness beside the fit to the ellipses


class NamedSegments(NamedTuple):
    """Segments that are taken for the lungs.

    Attributes:
        segments: Their numbers, ascending.
        score: How well they fit the prior; higher is better, comparable between settings of one image.
        mask: `(H, W)` bool, their union.
    """

    segments: tuple[int, ...]
    score: float
    mask: Tensor


def lung_prior(size: int) -> Tensor:
    """The prior as a mask `(size, size)` bool of a square image."""
    line = (torch.arange(size) + 0.5) / size
    y, x = line[:, None], line[None, :]
    inside = [((x - left) / width) ** 2 + ((y - top) / height) ** 2 <= 1 for left, top, width, height in _ELLIPSES]
    return torch.stack(inside).any(dim=0)


def name_lungs(segments: Tensor, image: Tensor) -> NamedSegments:
    """Choose the one or two segments that are the lungs, by position, shape and darkness.

    The score of a union is its Dice coefficient with the prior, plus a tenth of how much darker it is than the rest of
    the image, in standard deviations of the image's brightness.

    Args:
        segments: `(H, H)` integers of 0 or more.
        image: `(H, H)`, air dark; any range.
    """
    size = segments.shape[-1]
    if segments.shape != (size, size) or image.shape != segments.shape:
        raise ValueError(
            f"Expected segments and a gray image, squares of one size, got {tuple(segments.shape)} and "
            f"{tuple(image.shape)}."
        )
    flat = segments.flatten()
    prior = lung_prior(size).flatten().to(segments.device)
    area = torch.bincount(flat).double()  # (K,)
    overlap = torch.bincount(flat[prior], minlength=len(area)).double()
    brightness = image.flatten().double().to(flat.device)
    brightness = (brightness - brightness.mean()) / brightness.std().clamp(min=1e-9)
    sums = torch.bincount(flat, weights=brightness, minlength=len(area))  # they sum to 0 over all segments

    # Entry (i, j) of each table is of the union of i and j, entry (i, i) of only i.
    inside, hits, total = (union_table(values) for values in (area, overlap, sums))
    fit = 2 * hits / (inside + prior.sum())
    darker = -total / (len(flat) - inside).clamp(min=1) - total / inside.clamp(min=1)  # mean outside less inside
    score = torch.where(inside > 0, fit + _DARKNESS * darker, -torch.inf)
    first, second = divmod(int(score.argmax()), len(area))
    if not score[first, second] > score.diagonal().max() or not area[first] or not area[second]:
        first = second = int(score.diagonal().argmax())  # of equal ones the fewer segments
    chosen = (first,) if first == second else (first, second)
    mask = torch.isin(segments, torch.tensor(chosen, dtype=segments.dtype, device=segments.device))
    return NamedSegments(chosen, score[first, second].item(), mask)


def union_table(values: Tensor) -> Tensor:
    """Sums over the union of any two segments `(K, K)`, from values of each `(K,)`; the diagonal is of one segment."""
    single = torch.eye(len(values), dtype=torch.bool, device=values.device)
    return torch.where(single, values, values[:, None] + values)


def most_agreed(masks: Tensor) -> int:
    """The number of the mask that the others agree with most: of largest mean Dice coefficient with all others.

    `masks` are `(P, H, W)` bool, such as one for each setting of a sweep; of equals the first is taken.
    """
    if masks.ndim != 3 or not len(masks) or masks.dtype != torch.bool:
        raise ValueError(f"Expected boolean masks (P, H, W), at least one, got {tuple(masks.shape)} {masks.dtype}.")
    flat = masks.flatten(1).float()
    area = flat.sum(dim=1)
    total = area[:, None] + area
    agreement = torch.where(total > 0, 2 * (flat @ flat.T) / total.clamp(min=1), 1.0)  # (P, P)
    return int(agreement.double().sum(dim=1).argmax())  # each agrees with itself fully: that decides nothing


def name_lung_clusters(segments: Tensor, images: Tensor) -> tuple[int, ...]:
    """Which segments are lungs, where a segment's number means the same in all images: by position and darkness.

    They are those that lie mostly inside the ellipses, and are darker than what surrounds them, over all images
    together; of none that are both, the one that is inside most. What one image leaves open, many decide.

    Args:
        segments: `(N, s, s)` integers of 0 or more.
        images: `(N, H, H)` gray, air dark; any range.
    """
    count, size = len(segments), segments.shape[-1]
    if segments.ndim != 3 or segments.shape[-2] != size or images.ndim != 3 or len(images) != count or not count:
        raise ValueError(
            f"Expected segments (N, s, s) of N gray images (N, H, H), got {tuple(segments.shape)} and "
            f"{tuple(images.shape)}."
        )
    small = F.interpolate(images[:, None].float(), size=(size, size), mode="bilinear", antialias=True)
    reach = max(1, size // 6)  # a third of the side, as wide as a lung
    around = F.avg_pool2d(small, 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)
    lighter = (small - around) / small.std(dim=(-2, -1), keepdim=True).clamp(min=1e-9)
    flat, prior = segments.flatten(), lung_prior(size).to(segments.device).expand(count, -1, -1).flatten()
    area = torch.bincount(flat).double()
    inside = torch.bincount(flat[prior], minlength=len(area)).double() / area.clamp(min=1)
    lightness = torch.bincount(flat, weights=lighter.flatten().double().to(flat.device), minlength=len(area))
    named = ((inside > 0.5) & (lightness < 0)).nonzero()[:, 0].tolist()
    return tuple(named) or (int(torch.where(lightness < 0, inside, inside - 1).argmax()),)


def fit_lung_clusters(
    features: Sequence[Tensor],
    images: Tensor,
    num_clusters: int | Sequence[int] = range(4, 13),
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> FeatureClusters:
    """Clusters of many radiographs' features, of which those that are lungs are named so; no mask is needed.

    Args:
        features: Batch by batch, `(B, D, h, w)`, of N images in all.
        images: `(N, H, H)` gray, air dark; any range.

    The other arguments are those of `fit_clusters`.
    """
    clusters = fit_clusters(features, num_clusters, settings=settings, seed=seed)
    found = torch.cat([clusters.assign(batch.float()).argmax(dim=1).cpu() for batch in features])
    return clusters.named("lungs", name_lung_clusters(found, images))
