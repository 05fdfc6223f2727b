"""Agreement of segments with a reference mask: the Dice coefficient, and the best union of segments.

Empty masks follow one convention: two empty masks agree fully (1), an empty one and another not at all (0).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..diffseg.lungs import union_table

__all__ = ["SegmentUnion", "best_union", "dice", "union_of"]


class SegmentUnion(NamedTuple):
    """A union of segments of one image: its Dice coefficient with the reference, and their numbers, ascending."""

    dice: float
    segments: tuple[int, ...]


def dice(prediction: Tensor, target: Tensor) -> Tensor:
    """Dice coefficient `2 |A and B| / (|A| + |B|)` of masks `(..., H, W)` bool: `(...)` float64 in [0, 1].

    ValueError if the shapes differ or the masks are not boolean.
    """
    for name, mask in (("prediction", prediction), ("target", target)):
        if mask.dtype != torch.bool:
            raise ValueError(
                f"The {name} is {mask.dtype}, masks are boolean: compare with a threshold, such as mask > 0."
            )
    if prediction.shape != target.shape or prediction.ndim < 2:
        raise ValueError(f"Masks must have one size, got {tuple(prediction.shape)} and {tuple(target.shape)}.")
    both, first, second = (x.sum(dim=(-2, -1)).double() for x in (prediction & target, prediction, target))
    total = first + second
    return torch.where(total > 0, 2 * both / total.clamp(min=1), 1.0)


def best_union(segments: Tensor, target: Tensor) -> SegmentUnion:
    """The union of one or two segments that agrees best with a reference: an oracle, as it looks at the answer.

    Of equal ones it is the one with fewer segments, then with the smaller numbers. `segments` `(H, W)` are integers of
    0 or more, `target` is `(H, W)` bool; a left and a right lung may be two segments.
    """
    if segments.shape != target.shape or segments.ndim != 2 or target.dtype != torch.bool:
        raise ValueError(
            f"Expected segments (H, W) and a boolean mask of that size, got {tuple(segments.shape)} and "
            f"{tuple(target.shape)} {target.dtype}."
        )
    area = torch.bincount(segments.flatten()).double()  # (K,)
    hits = torch.bincount(segments[target], minlength=len(area)).double()
    size = target.sum().double()
    union_hits, union_area = union_table(hits), union_table(area)
    scores = 2 * union_hits / (union_area + size).clamp(min=1)
    best_one = int(scores.diagonal().argmax())
    first, second = divmod(int(scores.argmax()), len(area))
    if scores[first, second] > scores[best_one, best_one]:
        return SegmentUnion(scores[first, second].item(), (first, second))
    return SegmentUnion(scores[best_one, best_one].item(), (best_one,))


def union_of(segments: Tensor, chosen: tuple[int, ...]) -> Tensor:
    """The mask `(..., H, W)` bool of the pixels whose segment is one of `chosen`."""
    return torch.isin(segments, torch.tensor(chosen, dtype=segments.dtype, device=segments.device))
