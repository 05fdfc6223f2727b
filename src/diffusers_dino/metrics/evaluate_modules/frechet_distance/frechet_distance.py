"""Fréchet distance of features, for `evaluate.load`."""

from __future__ import annotations

from torch import Tensor

from diffusers_dino.metrics import GaussianStatistics, frechet_distance, kernel_distance
from diffusers_dino.metrics.evaluate_modules import base

__all__ = ["FrechetDistance"]


class FrechetDistance(base.FeatureModule):
    """Fréchet distance of Gaussians fitted to two sets of features; lower is better."""

    published = "Heusel et al. 2017, arXiv:1706.08500"
    returns = "frechet_distance, num_predictions, num_references; kernel_distance where the real features are known"
    takes_statistics = True

    def figures(self, features: Tensor, reference: Tensor | GaussianStatistics) -> dict[str, float]:
        distance = {"frechet_distance": frechet_distance(features, reference)}
        if isinstance(reference, GaussianStatistics):
            return distance
        return {**distance, "kernel_distance": kernel_distance(features, reference)}
