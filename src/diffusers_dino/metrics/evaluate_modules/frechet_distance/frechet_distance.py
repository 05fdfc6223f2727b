"""Fréchet distance of features, for `evaluate.load`."""

from __future__ import annotations

from typing import Any

from diffusers_dino.metrics import GaussianStatistics, frechet_distance, kernel_distance
from diffusers_dino.metrics.evaluate_modules import base

__all__ = ["FrechetDistance"]


class FrechetDistance(base.FeatureModule):
    """Fréchet distance of Gaussians fitted to two sets of features; lower is better."""

    published = "Heusel et al. 2017, arXiv:1706.08500"
    returns = "frechet_distance, num_predictions, num_references; kernel_distance where the real features are known"
    takes_statistics = True

    def _compute(self, predictions: Any, references: Any = None, reference_file: str | None = None) -> dict[str, Any]:
        generated, reference = base.to_tensor(predictions), base.reference_statistics(references, reference_file)
        figures = {"frechet_distance": frechet_distance(generated, reference), "num_predictions": len(generated)}
        if isinstance(reference, GaussianStatistics):
            return {**figures, "num_references": reference.count}
        return {**figures, "num_references": len(reference), "kernel_distance": kernel_distance(generated, reference)}
