"""Experiments that answer one question each; results are frozen dataclasses that go to JSON and back."""

from .augmentation import summarise
from .augmentation_result import AugmentationResult
from .fidelity import FidelityResult, FidelityScores, Sampling, generate_features, score_fidelity
from .interpolation import InterpolationResult, PathFigures, PathSpace, evaluate_interpolation
from .label_preservation import LabelPreservationResult, evaluate_labels
from .memorization import MemorizationResult, evaluate_memorization
from .reconstruction import ReconstructionResult, RetrievalFigures, evaluate_reconstruction
from .segment_sweep import Setting, Sweep, SweptSegments, segment_images
from .segmentation import MethodScores, SegmentationResult, SweepScores, evaluate_segmentation

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
