"""Features of an image's patches, one vector each, as maps `(B, D, h, w)`: side by side, and how alike they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["centered", "stack_features"]


def centered(features: Tensor) -> Tensor:
    """Features `(B, D, h, w)` without their mean over each image, in which exposure and style are."""
    return features - features.mean(dim=(-2, -1), keepdim=True)


def stack_features(maps: Sequence[Tensor]) -> Tensor:
    """Features of several sources `(B, D_i, h_i, w_i)` as one `(B, sum of D_i, h, w)`, on the finest of their grids.

    Each is centred and brought to one mean square over an image, so that none outweighs the others.
    """
    height, width = (max(each.shape[axis] for each in maps) for axis in (-2, -1))
    parts = []
    for each in map(centered, maps):
        scale = each.square().sum(dim=1).mean(dim=(-2, -1)).clamp(min=1e-12).rsqrt()
        resized = F.interpolate(each, size=(height, width), mode="bilinear")
        parts.append(resized * scale[:, None, None, None])
    return torch.cat(parts, dim=1)
