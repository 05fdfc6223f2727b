"""One small file for each family of feature extractors."""

from .base import FeatureExtractor, FeatureSpec
from .thumbnail import open_pixels, pixel_features
from .tiny import open_tiny

__all__ = ["FeatureExtractor", "FeatureSpec", "open_pixels", "open_tiny", "pixel_features"]
