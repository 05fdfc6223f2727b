"""One small file for each family of feature extractors."""

from .base import FeatureExtractor, FeatureSpec
from .thumbnail import open_pixels, pixel_features

__all__ = ["FeatureExtractor", "FeatureSpec", "open_pixels", "pixel_features"]
