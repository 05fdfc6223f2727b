"""Precision, recall, density and coverage of features, for `evaluate.load`."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor

from diffusers_dino.metrics import manifold_figures
from diffusers_dino.metrics.evaluate_modules import base

__all__ = ["ManifoldFigures"]


class ManifoldFigures(base.FeatureModule):
    """Precision, recall, density and coverage of generated features; higher is better."""

    published = "Kynkaanniemi et al. 2019, arXiv:1904.06991; Naeem et al. 2020, arXiv:2002.09797"
    arguments = "\n    k: the neighbour that balls reach to."
    returns = "precision, recall, density, coverage, k, num_predictions, num_references"

    def figures(self, features: Tensor, reference: Tensor, k: int = 5) -> dict[str, float]:
        return asdict(manifold_figures(features, reference, k))
