"""What to generate: which images to mix, how far, and what the result is to be called."""

from .pairs import Pair, interpolated_labels, sample_pairs

__all__ = ["Pair", "interpolated_labels", "sample_pairs"]
