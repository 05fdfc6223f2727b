"""Precision, recall, density and coverage of features, for `evaluate.load`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import evaluate

from diffusers_dino.metrics import manifold_figures
from diffusers_dino.metrics.evaluate_modules.features import describe, reference_features, to_tensor

__all__ = ["ManifoldFigures"]

_USAGE = """
Args:
    predictions: features of the generated images, (N, D).
    references: features of as many real images, (N, D). With evaluate.load(path, "from_file") they are left out.
    reference_file: then, a file of a `FeatureSet`.
    k: the neighbour that balls reach to.
Returns:
    precision, recall, density, coverage, k, num_predictions, num_references.
"""


class ManifoldFigures(evaluate.Metric):
    """Precision, recall, density and coverage of generated features; higher is better."""

    def _info(self) -> evaluate.MetricInfo:
        return describe(
            "Precision, recall, density and coverage of generated features; higher is better.",
            "Kynkaanniemi et al. 2019, arXiv:1904.06991; Naeem et al. 2020, arXiv:2002.09797",
            _USAGE,
            self.config_name,
        )

    def _compute(
        self, predictions: Any, references: Any = None, reference_file: str | None = None, k: int = 5
    ) -> dict[str, Any]:
        generated, reference = to_tensor(predictions), reference_features(references, reference_file)
        counts = {"num_predictions": len(generated), "num_references": len(reference)}
        return {**asdict(manifold_figures(generated, reference, k)), **counts}
