"""Kernel distance (KID) of features, for `evaluate.load`."""

from __future__ import annotations

from typing import Any

import evaluate

from diffusers_dino.metrics import kernel_distance
from diffusers_dino.metrics.evaluate_modules.features import describe, reference_features, to_tensor

__all__ = ["KernelDistance"]

_USAGE = """
Args:
    predictions: features of the generated images, (N, D).
    references: features of as many real images, (N, D). With evaluate.load(path, "from_file") they are left out.
    reference_file: then, a file of a `FeatureSet`.
Returns:
    kernel_distance, num_predictions, num_references.
"""


class KernelDistance(evaluate.Metric):
    """Unbiased squared MMD of two sets of features with a cubic kernel (KID); lower is better."""

    def _info(self) -> evaluate.MetricInfo:
        return describe(
            "Unbiased squared MMD of two sets of features with a cubic kernel (KID); lower is better.",
            "Binkowski et al. 2018, arXiv:1801.01401",
            _USAGE,
            self.config_name,
        )

    def _compute(self, predictions: Any, references: Any = None, reference_file: str | None = None) -> dict[str, Any]:
        generated, reference = to_tensor(predictions), reference_features(references, reference_file)
        counts = {"num_predictions": len(generated), "num_references": len(reference)}
        return {"kernel_distance": kernel_distance(generated, reference), **counts}
