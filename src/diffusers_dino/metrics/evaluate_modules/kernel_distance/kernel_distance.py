"""Kernel distance (KID) of features, for `evaluate.load`."""

from __future__ import annotations

from typing import Any

from diffusers_dino.metrics import kernel_distance
from diffusers_dino.metrics.evaluate_modules import base

__all__ = ["KernelDistance"]


class KernelDistance(base.FeatureModule):
    """Unbiased squared MMD of two sets of features with a cubic kernel (KID); lower is better."""

    published = "Binkowski et al. 2018, arXiv:1801.01401"
    returns = "kernel_distance, num_predictions, num_references"

    def _compute(self, predictions: Any, references: Any = None, reference_file: str | None = None) -> dict[str, Any]:
        generated, reference = base.to_tensor(predictions), base.reference_features(references, reference_file)
        counts = {"num_predictions": len(generated), "num_references": len(reference)}
        return {"kernel_distance": kernel_distance(generated, reference), **counts}
