"""Experiments that answer one question each; results are frozen dataclasses that go to JSON and back."""

from .augmentation.comparison import summarise
from .augmentation.result import AugmentationResult
from .fidelity.protocol import FidelityResult, FidelityScores, Sampling, generate_features, score_fidelity
from .interpolation.protocol import InterpolationResult, PathFigures, PathSpace, evaluate_interpolation
from .labels.protocol import LabelPreservationResult, evaluate_labels
from .memorization.protocol import MemorizationResult, evaluate_memorization
from .reconstruction.protocol import ReconstructionResult, RetrievalFigures, evaluate_reconstruction
from .segmentation.protocol import MethodScores, SegmentationResult, SweepScores, evaluate_segmentation
from .segmentation.sweep import Setting, Sweep, SweptSegments, segment_images

__all__ = [
    "AugmentationResult",
    "FidelityResult",
    "FidelityScores",
    "InterpolationResult",
    "LabelPreservationResult",
    "MemorizationResult",
    "MethodScores",
    "PathFigures",
    "PathSpace",
    "ReconstructionResult",
    "RetrievalFigures",
    "Sampling",
    "SegmentationResult",
    "Setting",
    "Sweep",
    "SweepScores",
    "SweptSegments",
    "evaluate_interpolation",
    "evaluate_labels",
    "evaluate_memorization",
    "evaluate_reconstruction",
    "evaluate_segmentation",
    "generate_features",
    "score_fidelity",
    "segment_images",
    "summarise",
]
