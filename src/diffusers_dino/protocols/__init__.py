"""Experiments that answer one question each; results are frozen dataclasses that go to JSON and back."""

from .reconstruction import ReconstructionResult, RetrievalFigures, evaluate_reconstruction

__all__ = ["ReconstructionResult", "RetrievalFigures", "evaluate_reconstruction"]
