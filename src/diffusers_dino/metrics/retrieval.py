"""Does a generated image find the image that it was generated from?"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["nearest_neighbors", "retrieval_accuracy"]


def nearest_neighbors(queries: Tensor, gallery: Tensor) -> Tensor:
    """Index of each query's nearest gallery item by the cosine of features centred on the gallery's mean.

    Args:
        queries: `(N, D)`.
        gallery: `(M, D)`, M >= 2.

    Returns:
        `(N,)` int64, indices into the gallery.

    Raises:
        ValueError: The shapes do not fit.
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

    Args:
        queries: `(N, D)` features of generated images.
        gallery: `(N, D)` features of the images they were generated from. Chance is 1 / N.

    Raises:
        ValueError: The shapes do not fit, or the numbers of queries and sources differ.
    """
    if len(queries) != len(gallery):
        raise ValueError(f"Each query needs its source: got {len(queries)} queries and {len(gallery)} sources.")
    hits = nearest_neighbors(queries, gallery) == torch.arange(len(gallery), device=queries.device)
    return hits.float().mean().item()
