"""A model on batches of one size, whose results do not depend on how many rows there are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["in_batches"]


def in_batches(model: Callable[..., Tensor], batch_size: int | None, *rows: Tensor) -> Tensor:
    """Call `model` on `batch_size` rows of each tensor at a time, the last batch filled up; without a size, on all.

    Kernels are chosen by shape, and each sums in its own order: rows are the same bits only in batches of one size.
    """
    count = len(rows[0])
    if batch_size is None:
        return model(*rows)
    results = []
    for first in range(0, count, batch_size):
        chosen = torch.arange(first, first + batch_size, device=rows[0].device).clamp(max=count - 1)
        results.append(model(*(tensor[chosen] for tensor in rows)))
    return torch.cat(results)[:count]
