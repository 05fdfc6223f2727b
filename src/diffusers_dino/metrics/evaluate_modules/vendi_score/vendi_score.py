"""Vendi score of features, for `evaluate.load`."""

from __future__ import annotations

from typing import Any

import evaluate

from diffusers_dino.metrics import vendi_score
from diffusers_dino.metrics.evaluate_modules.features import describe, to_tensor

__all__ = ["VendiScore"]

_USAGE = """
Args:
    predictions: features of the images, (N, D).
Returns:
    vendi_score, num_predictions.
"""


class VendiScore(evaluate.Metric):
    """Effective number of distinct features, by cosine (Vendi score); it grows with their number."""

    def _info(self) -> evaluate.MetricInfo:
        return describe(
            "Effective number of distinct features, by cosine (Vendi score); it grows with their number.",
            "Friedman & Dieng 2023, arXiv:2210.02410",
            _USAGE,
            self.config_name,
            paired=False,
        )

    def _compute(self, predictions: Any) -> dict[str, Any]:
        features = to_tensor(predictions)
        return {"vendi_score": vendi_score(features), "num_predictions": len(features)}
