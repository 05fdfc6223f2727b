"""Vendi score of features, for `evaluate.load`."""

from __future__ import annotations

from torch import Tensor

from diffusers_dino.metrics import vendi_score
from diffusers_dino.metrics.evaluate_modules import base

__all__ = ["VendiScore"]


class VendiScore(base.FeatureModule):
    """Effective number of distinct features, by cosine (Vendi score); it grows with their number."""

    published = "Friedman & Dieng 2023, arXiv:2210.02410"
    returns = "vendi_score, num_predictions"
    paired = False

    def figures(self, features: Tensor) -> dict[str, float]:
        return {"vendi_score": vendi_score(features)}
