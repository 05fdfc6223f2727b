"""The synthetic sets of an experiment: how they are made, and which labels their images train with."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...data import ImageDataset, Preprocessing, open_images
from ...data.labels import LabelTable
from ...devices import device_of
from ...metrics.copy_gate import CopyGate
from ...pipelines import DinoPriorPipeline
from ...pipelines.checks import image_size
from ...synthesis import Plan, PlannedImage, PriorTokens, load_generator, soft_labels, synthesise
from ..classifier import ClassifierSettings
from ..generation import stack_images
from ..packed import pack_images
from .generators import PerFold, of_fold

__all__ = ["FoldPriors", "SetOptions", "make_set", "targets_of"]

logger = logging.getLogger(__name__)

_SHOWN_TO_GATE = 16


@dataclass(frozen=True)
class FoldPriors:
    """The prior of each fold, and how tokens are drawn from it: see `PriorTokens`."""

    paths: PerFold
    guidance_scale: float = 1.0
    num_inference_steps: int = 50

    def open(self, fold: int, device: str) -> PriorTokens:
        """The prior of a fold."""
        pipe = DinoPriorPipeline.from_pretrained(of_fold(self.paths, fold)).to(device)
        return PriorTokens(pipe, self.guidance_scale, self.num_inference_steps)

    def table_for(self, fold: int, table: LabelTable, labels: Sequence[str]) -> LabelTable:
        """The table with all labels that the prior of a fold knows; ValueError if it lacks one that is classified."""
        known = self.open(fold, "cpu").pipe.labels
        for name in labels:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1, cutoff=0)
                nearest = f"The nearest one is {close[0]!r}; t" if close else "T"
                raise ValueError(
                    f"The prior of fold {fold} cannot draw {name!r}, which the regimes have. {nearest}here are "
                    f"{', '.join(map(repr, known)) or 'none'}. Train it with that label, or classify other labels."
                )
        return LabelTable(table.keys, tuple(own & {*known} for own in table.labels), table.patients)


@dataclass(frozen=True)
class SetOptions:
    """How the images of a set are made and packed; it travels to other processes."""

    images: ImageDataset
    generators: PerFold
    priors: FoldPriors | None
    gates: PerFold | None
    dtype: str
    scheduler: str | None
    classifier: ClassifierSettings
    device: str | None
    progress: bool


def make_set(place: int, options: SetOptions, fold: int, plan: Plan, folder: Path) -> str:
    """Make a set, or go on with it, and pack its images for classifiers. Returns the digest of its plan."""
    device = device_of(place, options.device)
    pipe = load_generator(of_fold(options.generators, fold), options.dtype, options.scheduler).to(device)
    sources = options.images.resized(image_size(pipe))
    gate = None if options.gates is None else CopyGate.load(of_fold(options.gates, fold))
    known = gate is not None and plan.keys  # a prior's images have no sources
    if known and gate(stack_images(sources.select(plan.keys[:_SHOWN_TO_GATE]))).all():
        logger.warning(
            f"The gate of fold {fold} calls none of the first {_SHOWN_TO_GATE} sources a copy: is it of other images? "
            "A gate must know the images that the generator was trained on."
        )
    prior = options.priors.open(fold, device) if plan.strategy == "prior" else None
    progress = options.progress and place == 0
    made = synthesise(plan, pipe, sources, folder, gate=gate, prior=prior, progress=progress)
    images = open_images(folder, Preprocessing(options.classifier.size, remove_borders=False))
    pack_images(images, folder.with_name(f"{folder.name}.npy"), made.plan.digest, options.classifier.channels)
    return made.plan.digest


def targets_of(
    images: Sequence[PlannedImage],
    labels: Sequence[str],
    exponent: float | None = None,
    labels_of: Mapping[str, Collection[str]] | None = None,
) -> np.ndarray:
    """The labels that images train with: `(N, L)` bool; with an exponent soft ones, `(N, L)` float32.

    Soft labels are those between the labels of an image's two sources, `labels_of` their keys.
    """
    if exponent is None:
        rows = [[name in (image.labels or ()) for name in labels] for image in images]
        return np.array(rows, dtype=bool).reshape(len(images), len(labels))
    given = [soft_labels(*(labels_of[key] for key in image.sources), image.fraction, exponent) for image in images]
    rows = [[own.get(name, 0.0) for name in labels] for own in given]
    return np.array(rows, dtype=np.float32).reshape(len(images), len(labels))
