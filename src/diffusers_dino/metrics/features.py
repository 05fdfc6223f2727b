"""From images to feature vectors, by name."""

from __future__ import annotations

import os

import torch

from .extractors import FeatureExtractor, FeatureSpec, open_local_contrast, open_pixels, pixel_features

__all__ = ["EXTRACTORS", "FeatureExtractor", "FeatureSpec", "open_extractor", "pixel_features"]

_PURE = {"pixels": open_pixels, "local-contrast": open_local_contrast}  # no network, no weights
EXTRACTORS = ("pixels", "local-contrast")


def open_extractor(
    name: str,
    weights: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    *,
    sha256: str | None = None,
) -> FeatureExtractor:
    """Open a feature extractor. Nothing is ever downloaded: weights are a local file or folder.

    Args:
        name: One of `EXTRACTORS`.
        weights: File or folder of the weights.
        device: Where it computes.
        sha256: What the SHA-256 of the weight file must be.

    Raises:
        ValueError: If the name is not known, or the weights are not what they should be.
    """
    if name in _PURE:
        if weights is not None:
            raise ValueError(f"The extractor {name} has no weights.")
        return _PURE[name](device)
    raise ValueError(f"There is no feature extractor {name!r}: give one of {', '.join(EXTRACTORS)}.")
