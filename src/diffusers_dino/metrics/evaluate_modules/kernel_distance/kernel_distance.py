"""Kernel distance (KID) of features, for `evaluate.load`."""

from __future__ import annotations

from torch import Tensor

from diffusers_dino.metrics import kernel_distance
from diffusers_dino.metrics.evaluate_modules import base

__all__ = ["KernelDistance"]


class KernelDistance(base.FeatureModule):
    """Unbiased squared MMD of two sets of features with a cubic kernel (KID); lower is better."""

    published = "Binkowski et al. 2018, arXiv:1801.01401"
    returns = "kernel_distance, num_predictions, num_references"

    def figures(self, features: Tensor, reference: Tensor) -> dict[str, float]:
        return {"kernel_distance": kernel_distance(features, reference)}
