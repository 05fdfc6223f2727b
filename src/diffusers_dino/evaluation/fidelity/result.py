"""What the fidelity protocol finds: a row of figures for each set of images, with all that they depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...metrics import FeatureSpec
from ...metrics.bootstrap import Estimate
from ..results import JsonResult

__all__ = ["REAL", "UNTRAINED", "FidelityResult", "FidelityScores", "Sampling"]

REAL, UNTRAINED = "real", "untrained"


@dataclass(frozen=True)
class Sampling:
    """How images were generated.

    Attributes:
        scheduler, num_inference_steps: Class of the noise schedule, and its steps.
        guidance_scale: 1 is none.
        seed: Of the noise, together with the key of the source.
        batch_size: Images generated at once; rounding depends on it.
        dtype: Of the weights.
    """

    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    seed: int
    batch_size: int
    dtype: str = "float32"


@dataclass(frozen=True)
class FidelityScores(JsonResult):
    """All figures of one set of images against one reference, with all that they depend on.

    Attributes:
        images: What they are: the name of a model or checkpoint, `UNTRAINED` or `REAL`.
        step: Updates of the checkpoint; None for what is not one.
        num_images, num_reference: N and M.
        features: Extractor, layer, pixel range, resize and hash of the weights.
        sampling: How they were generated; None for real images.
        neighbors: The neighbour that balls of precision, recall, density and coverage reach to.
        repeats, bootstrap_seed, level: Of the intervals: see `metrics.Bootstrap`.
        by_patient: Whether patients were drawn, not images.
        frechet, kernel: Fréchet and kernel distance (KID); lower is better. The latter is unbiased.
        precision, recall, density, coverage: See `metrics.ManifoldFigures`; higher is better.
        vendi: Vendi score of the N images.
        label: Label that all images of both sets have; None for all images.
    """

    images: str
    step: int | None
    num_images: int
    num_reference: int
    features: FeatureSpec
    sampling: Sampling | None
    neighbors: int
    repeats: int
    bootstrap_seed: int
    level: float
    by_patient: bool
    frechet: Estimate
    kernel: Estimate
    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate
    vendi: Estimate
    label: str | None = None

    @property
    def is_singular(self) -> bool:
        """Whether a set is too small for the covariance that the Fréchet distance asks for."""
        return min(self.num_images, self.num_reference) <= self.features.dim


@dataclass(frozen=True)
class FidelityResult(JsonResult):
    """The rows of models or checkpoints, then of controls; all of one reference and one extractor.

    Attributes:
        rows: Of all images.
        by_label: Of the images of one label after the other, against the reference images that have it.
        too_few: Labels that too few sources or reference images have.
    """

    rows: tuple[FidelityScores, ...]
    by_label: tuple[FidelityScores, ...] = ()
    too_few: tuple[str, ...] = ()

    def row(self, images: str) -> FidelityScores | None:
        """The row of this name, None if there is none."""
        return next((row for row in self.rows if row.images == images), None)

    @property
    def checkpoints(self) -> tuple[FidelityScores, ...]:
        """The rows of checkpoints, by their number of updates."""
        return tuple(sorted((row for row in self.rows if row.step is not None), key=lambda row: row.step))

    def best_checkpoint(self, metric: Literal["frechet", "kernel"] = "frechet") -> FidelityScores:
        """The checkpoint with the lowest distance; ValueError if there is none."""
        if not self.checkpoints:
            raise ValueError("The result holds no checkpoint to choose from.")
        return min(self.checkpoints, key=lambda row: getattr(row, metric).value)
