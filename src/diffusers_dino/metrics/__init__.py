"""Figures of merit: features, then pure functions of features."""

from .distances import frechet_distance
from .feature_sets import FeatureSet, extract_features
from .features import FeatureExtractor, FeatureSpec, open_extractor, pixel_features
from .retrieval import retrieval_accuracy

__all__ = [
    "FeatureExtractor",
    "FeatureSet",
    "FeatureSpec",
    "extract_features",
    "frechet_distance",
    "open_extractor",
    "pixel_features",
    "retrieval_accuracy",
]
