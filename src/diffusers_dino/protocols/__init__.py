"""Experiments that answer one question each; results are frozen dataclasses that go to JSON and back."""

from .interpolation import InterpolationResult, PathFigures, PathSpace, evaluate_interpolation
from .memorization import MemorizationResult, evaluate_memorization
from .reconstruction import ReconstructionResult, RetrievalFigures, evaluate_reconstruction
from .segment_sweep import Setting, Sweep, SweptSegments, segment_images
from .segmentation import MethodScores, SegmentationResult, SweepScores, evaluate_segmentation

__all__ = [
    "InterpolationResult",
    "MemorizationResult",
    "MethodScores",
    "PathFigures",
    "PathSpace",
    "ReconstructionResult",
    "RetrievalFigures",
    "SegmentationResult",
    "Setting",
    "Sweep",
    "SweepScores",
    "SweptSegments",
    "evaluate_interpolation",
    "evaluate_memorization",
    "evaluate_reconstruction",
    "evaluate_segmentation",
    "segment_images",
]
