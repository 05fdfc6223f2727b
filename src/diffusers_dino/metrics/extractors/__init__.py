"""One small file for each family of feature extractors."""

from .base import FeatureExtractor, FeatureSpec
from .local_contrast import local_contrast_features, open_local_contrast
from .thumbnail import open_pixels, pixel_features

__all__ = [
    "FeatureExtractor",
    "FeatureSpec",
    "local_contrast_features",
    "open_local_contrast",
    "open_pixels",
    "pixel_features",
]
