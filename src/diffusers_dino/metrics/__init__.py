"""Figures of merit: features, then pure functions of features."""

from .bootstrap import Bootstrap, Interval, bootstrap_interval
from .distances import GaussianStatistics, frechet_distance, kernel_distance, kernel_distance_of_subsets
from .extractors import FeatureExtractor, FeatureSpec, open_extractor, pixel_features
from .features import FeatureSet, extract_features
from .manifolds import ManifoldFigures, manifold_figures, vendi_score
from .neighbours import retrieval_accuracy

__all__ = [
    "Bootstrap",
    "FeatureExtractor",
    "FeatureSet",
    "FeatureSpec",
    "GaussianStatistics",
    "Interval",
    "ManifoldFigures",
    "bootstrap_interval",
    "extract_features",
    "frechet_distance",
    "kernel_distance",
    "kernel_distance_of_subsets",
    "manifold_figures",
    "open_extractor",
    "pixel_features",
    "retrieval_accuracy",
    "vendi_score",
]
