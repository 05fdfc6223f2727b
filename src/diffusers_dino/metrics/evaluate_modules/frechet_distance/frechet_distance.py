"""Fréchet distance of features, for `evaluate.load`."""

from __future__ import annotations

from typing import Any

import evaluate

from diffusers_dino.metrics import GaussianStatistics, frechet_distance, kernel_distance
from diffusers_dino.metrics.evaluate_modules.features import describe, reference_statistics, to_tensor

__all__ = ["FrechetDistance"]

_USAGE = """
Args:
    predictions: features of the generated images, (N, D).
    references: features of as many real images, (N, D). With evaluate.load(path, "from_file") they are left out.
    reference_file: then, a file of `GaussianStatistics` or of a `FeatureSet`.
Returns:
    frechet_distance, num_predictions, num_references; kernel_distance where the real features are known.
"""


class FrechetDistance(evaluate.Metric):
    """Fréchet distance of Gaussians fitted to two sets of features; lower is better."""

    def _info(self) -> evaluate.MetricInfo:
        return describe(
            "Fréchet distance of Gaussians fitted to two sets of features; lower is better.",
            "Heusel et al. 2017, arXiv:1706.08500",
            _USAGE,
            self.config_name,
        )

    def _compute(self, predictions: Any, references: Any = None, reference_file: str | None = None) -> dict[str, Any]:
        generated, reference = to_tensor(predictions), reference_statistics(references, reference_file)
        known = reference.count if isinstance(reference, GaussianStatistics) else len(reference)
        figures = {"frechet_distance": frechet_distance(generated, reference)}
        if not isinstance(reference, GaussianStatistics):
            figures["kernel_distance"] = kernel_distance(generated, reference)
        return {**figures, "num_predictions": len(generated), "num_references": known}
