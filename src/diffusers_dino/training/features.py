"""What the frozen models say of an image, computed for each batch or once and for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..conditioner import DinoImageConditioner
from ..data import Slot, TrainingViews
from ..latents import VAE, encode_to_moments
from ..pixels import unit_to_vae

__all__ = ["CachedViews", "FeatureEncoder", "Features"]


class Features(NamedTuple):
    """Features of B images.

    Attributes:
        mean: `(B, L, h, w)` float32, mean of the standardised latent's distribution.
        std: `(B, L, h, w)` float32, its standard deviation.
        tokens: `(B, S, D)`, the condition.
    """

    mean: Tensor
    std: Tensor
    tokens: Tensor


class FeatureEncoder:
    """Encodes batches with the frozen models, or takes the features that come with a batch.

    Args:
        vae: The autoencoder, on the device of training.
        conditioner: The conditioner, on the same device.
    """

    def __init__(self, vae: VAE, conditioner: DinoImageConditioner) -> None:
        self.vae, self.conditioner = vae, conditioner

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> Features:
        """Features of a batch of `TrainingViews` (which has `image`) or `CachedViews` (which has `features`)."""
        device = self.vae.device
        if "features" in batch:
            return Features(*(part.to(device, non_blocking=True) for part in batch["features"]))
        pixels = batch["image"].to(device, non_blocking=True)  # (B, 1 or 3, H, W) in [0, 1]
        mean, std = encode_to_moments(self.vae, unit_to_vae(pixels, self.vae.config["in_channels"]).to(self.vae.dtype))
        return Features(mean.float(), std.float(), self.conditioner.encode(pixels))


class CachedViews(Dataset[dict[str, Any]]):
    """Features of a few views of every image, computed now and kept in memory; takes the place of `TrainingViews`.

    In epoch e the view is that of epoch `e % num_views`; the latent is still sampled anew each time, from its cached
    distribution.

    Args:
        views: The views to encode.
        encoder: What encodes them.
        num_views: Views of each image.
        batch_size: Images encoded at once.
    """

    def __init__(self, views: TrainingViews, encoder: FeatureEncoder, num_views: int, batch_size: int = 32) -> None:
        self.keys, self.num_views = views.images.keys, num_views
        slots = [Slot(0, epoch, index) for epoch in range(num_views) for index in range(len(views))]
        parts = []
        for first in range(0, len(slots), batch_size):
            features = encoder(views.__getitems__(slots[first : first + batch_size]))
            parts.append([part.cpu() for part in features])
        self.features = Features(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, slot: Slot) -> dict[str, Any]:
        return self.__getitems__([slot])

    def __getitems__(self, slots: Sequence[Slot]) -> dict[str, Any]:
        """A whole batch at once: `features`, `key` and `position`."""
        rows = torch.tensor([slot.epoch % self.num_views * len(self) + slot.index for slot in slots])
        return {
            "features": tuple(part[rows] for part in self.features),
            "key": [self.keys[slot.index] for slot in slots],
            "position": [slot.position for slot in slots],
        }
