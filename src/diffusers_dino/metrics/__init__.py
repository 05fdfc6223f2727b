"""Figures of merit: features, then pure functions of features."""

from .bootstrap import Interval, bootstrap_interval
from .distances import frechet_distance, kernel_distance, kernel_distance_of_subsets
from .diversity import vendi_score
from .feature_sets import FeatureSet, extract_features
from .features import FeatureExtractor, FeatureSpec, open_extractor, pixel_features
from .manifolds import ManifoldFigures, manifold_figures
from .retrieval import retrieval_accuracy
from .statistics import GaussianStatistics

__all__ = [
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
