"""A model on batches of one size, whose results do not depend on how many rows there are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import check_numbers

__all__ = ["FixedBatchMixin", "in_batches"]


class FixedBatchMixin:
    """A pipeline whose images do not depend on how many others come with them."""

    _fixed_batch: int | None = None

    def enable_fixed_batch(self, batch_size: int) -> None:
        """Show encoder, denoiser and autoencoder exactly `batch_size` rows at a time, the last batch filled up.

        An image is then the same bits whatever the number of images in its call, if its generator is its own; a
        compiled model sees one shape; memory is that of one batch. Guidance makes two rows of an image.
        """
        check_numbers(batch_size=batch_size)
        self._fixed_batch = batch_size

    def disable_fixed_batch(self) -> None:
        """Back to all rows at once, the default."""
        self._fixed_batch = None


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
