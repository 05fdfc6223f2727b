"""Figures of merit: features, then pure functions of features."""

from .distances import frechet_distance
from .features import pixel_features
from .retrieval import retrieval_accuracy

__all__ = ["frechet_distance", "pixel_features", "retrieval_accuracy"]
