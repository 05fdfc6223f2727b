"""Precision, recall, density and coverage of features, for `evaluate.load`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from diffusers_dino.metrics import manifold_figures
from diffusers_dino.metrics.evaluate_modules import base

__all__ = ["ManifoldFigures"]


class ManifoldFigures(base.FeatureModule):
    """Precision, recall, density and coverage of generated features; higher is better."""

    published = "Kynkaanniemi et al. 2019, arXiv:1904.06991; Naeem et al. 2020, arXiv:2002.09797"
    arguments = "\n    k: the neighbour that balls reach to."
    returns = "precision, recall, density, coverage, k, num_predictions, num_references"

    def _compute(
        self, predictions: Any, references: Any = None, reference_file: str | None = None, k: int = 5
    ) -> dict[str, Any]:
        generated, reference = base.to_tensor(predictions), base.reference_features(references, reference_file)
        counts = {"num_predictions": len(generated), "num_references": len(reference)}
        return {**asdict(manifold_figures(generated, reference, k)), **counts}
