"""What a segmentation must be compared with: masks that need no diffusion model, for any data set with masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...extras import require

__all__ = ["kmeans_segments", "mean_mask_of_others", "otsu_mask"]


def otsu_mask(image: Tensor) -> Tensor:
    """Pixels `(H, W)` bool of an image in [0, 1] that are darker than Otsu's threshold (1979), as lungs are."""
    levels = (image.clamp(0, 1) * 255).round().long()
    counts = torch.bincount(levels.flatten(), minlength=256).double()
    below = counts.cumsum(0)  # pixels up to each level
    sums = (counts * torch.arange(256)).cumsum(0)
    # Variance between the two classes, for each threshold, up to a constant factor
    between = (sums[-1] * below - sums * below[-1]).square() / (below * (below[-1] - below)).clamp(min=1)
    return levels <= between.argmax()


def kmeans_segments(image: Tensor, num_segments: int, position_weight: float, side: int = 64, seed: int = 0) -> Tensor:
    """Segments `(H, W)` int64 of an image by k-means on brightness and position, at `side` x `side` pixels.

    `position_weight` is that of the two coordinates, against brightness; all three have a standard deviation of 1.
    """
    cluster = require("sklearn.cluster", "eval", "k-means needs scikit-learn")
    small = F.interpolate(image[None, None], size=(side, side), mode="bilinear", antialias=True).flatten().numpy()
    line = np.linspace(-1, 1, side) * np.sqrt(3 * (side - 1) / (side + 1))  # standard deviation 1
    y, x = (axis.flatten() for axis in np.meshgrid(line, line, indexing="ij"))
    brightness = (small - small.mean()) / max(small.std(), 1e-6)
    points = np.stack([brightness, position_weight * y, position_weight * x], axis=1)
    distinct = len(np.unique(points, axis=0))
    labels = cluster.KMeans(min(num_segments, distinct), n_init=1, random_state=seed).fit_predict(points)
    labels = torch.from_numpy(labels.reshape(1, 1, side, side).astype(np.float32))
    return F.interpolate(labels, size=image.shape, mode="nearest")[0, 0].long()


def mean_mask_of_others(masks: Tensor, patients: Sequence[str]) -> Tensor:
    """For each image the pixels that most masks of *other* patients hold: `(N, H, W)` bool.

    It has seen reference masks, but nothing of the image. ValueError if all masks are of one patient.
    """
    codes = torch.from_numpy(np.unique(patients, return_inverse=True)[1])
    if len(codes.unique()) < 2:
        raise ValueError("The mean mask of other patients needs at least two patients.")
    total, result = masks.sum(dim=0), []
    for code in codes:
        own = codes == code
        others = (total - masks[own].sum(dim=0)).double() / (~own).sum()
        result.append(others > 0.5)
    return torch.stack(result)
