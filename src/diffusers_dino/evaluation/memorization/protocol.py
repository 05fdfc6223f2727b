"""Does a synthetic set hold copies of training images? Measured against real images, which are not copies.

How near is too near is learned from real images: how near training images are to those of other patients. Real images
that were kept out of training are searched in the same way, and show how often the search is wrong; so do training
images that were tampered with, which show what it finds.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from ...conditioner import DinoImageConditioner
from ...data import ImageDataset
from ...metrics import FeatureExtractor, FeatureSpec, open_extractor
from ...metrics.copy_gate import (
    CopyGate,
    Distances,
    ImageViews,
    extract_views,
    known_groups,
    search_copies,
    search_training,
)
from ...metrics.neighbours import Groups, evenly_spread
from ...pipelines.checks import check_number, check_numbers
from ..controls import rows_in
from ..generation import embed_images, stack_images
from ..results import JsonResult
from .planted import PLANTED
from .sets import PlantedFigures, SetFigures, check_calibration, find_planted, summarize
from .tokens import TokenCopies, compare_tokens

__all__ = ["ClosePair", "MemorizationResult", "MemorizationStudy", "evaluate_memorization"]

logger = logging.getLogger(__name__)

Images = ImageDataset | Tensor


@dataclass(frozen=True)
class ClosePair:
    """The keys of a synthetic image and of its nearest training image, and their relative distance in [0, 1].

    `mirrored` says whether the mirror image of the synthetic one is near, `copy` whether it is below the threshold.
    """

    key: str
    training_key: str
    relative_distance: float
    mirrored: bool
    copy: bool


@dataclass(frozen=True)
class MemorizationResult(JsonResult):
    """All figures of one synthetic set.

    Attributes:
        spec: What was compared.
        false_alarms: Share of real images that the threshold may call copies.
        threshold: Relative distance below which an image counts as a copy.
        calibrated_on: Which real images the threshold comes from, `"training"` or `"held out"`.
        gate: Fingerprint of the gate of this threshold.
        training: Of the training images, each against those of other groups.
        held_out: Of real images that were not trained on; None without them.
        synthetic: Of the synthetic images; None without them.
        planted: Of tampered copies of training images.
        closest: The nearest synthetic images, nearest first.
        held_out_in_training: Held-out images that are training images, pixel by pixel: they should be none.
        tokens: The same search among condition tokens; None if there was no conditioner.
    """

    spec: FeatureSpec
    false_alarms: float
    threshold: float
    calibrated_on: str
    gate: str
    training: SetFigures
    held_out: SetFigures | None
    synthetic: SetFigures | None
    planted: tuple[PlantedFigures, ...]
    closest: tuple[ClosePair, ...]
    held_out_in_training: int = 0
    tokens: TokenCopies | None = None


class MemorizationStudy(NamedTuple):
    """Figures, and the gate that refuses what they call copies."""

    result: MemorizationResult
    gate: CopyGate


def evaluate_memorization(
    training: Images,
    synthetic: Images | None = None,
    held_out: Images | None = None,
    *,
    extractor: FeatureExtractor | None = None,
    training_groups: Groups | None = None,
    held_out_groups: Groups | None = None,
    false_alarms: float = 0.01,
    calibrate_on: Literal["training", "held out"] = "training",
    num_pairs: int = 12,
    num_planted: int = 50,
    conditioner: DinoImageConditioner | None = None,
    drawn: Tensor | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> MemorizationStudy:
    """Search a synthetic set for copies of training images, and check the search on real images.

    Args:
        training: What the generator was trained on, as a data set or `(M, C, H, H)` in [0, 1].
        synthetic: What it generated; without it only the search itself is set up and checked.
        held_out: Real images that it was not trained on.
        extractor: Feature space, by default `local-contrast`. Not the generator's own encoder: what that cannot see,
            the search could not, either.
        training_groups: Group of each training image, such as its patient; by default each image is its own. Images
            of one patient may resemble each other without being copies, so they are not compared.
        held_out_groups: Group of each held-out image; needs those of the training images.
        false_alarms: Share of real images that may be called copies.
        calibrate_on: Which real images the threshold comes from. `"held out"` is for training sets in which it is not
            known which images are of one patient; its false alarms are then true by construction.
        num_pairs: Nearest pairs to keep.
        num_planted: Training images that are tampered with in each way, to see what the search finds.
        conditioner: The generator's own: then the condition tokens of all sets are compared, too (`compare_tokens`).
        drawn: Tokens `(N, S, D)` that a prior drew; they stand for those of the synthetic images.

    ValueError if there are too few images to calibrate on, or groups do not fit.
    """
    check_calibration(held_out, calibrate_on, training_groups, held_out_groups)
    check_number(0, num_pairs=num_pairs)
    check_numbers(num_planted=num_planted)
    if drawn is not None and conditioner is None:
        raise ValueError("Drawn tokens are compared with those of training images: give their `conditioner`.")
    extractor = extractor or open_extractor("local-contrast")
    sets = {"training": training, "held_out": held_out, "synthetic": synthetic}
    views = {
        name: extract_views(extractor, images, batch_size, progress)
        for name, images in sets.items()
        if images is not None
    }
    known, num_seen, unseen_groups = views["training"], 0, None
    groups = known_groups(known, training, training_groups)
    found = {"training": search_training(known, groups)}
    spacing = found["training"].neighbors.distance  # (M,)
    if held_out is not None:
        unseen = views["held_out"]
        unseen_groups = known_groups(unseen, held_out, held_out_groups)
        num_seen = int(rows_in(unseen.upright.features, known.upright.features).sum())
        if num_seen and calibrate_on == "held out":
            raise ValueError(
                f"{num_seen} of the {len(unseen.upright)} held-out images are training images: no threshold can be "
                "learned from them. Leave them out."
            )
        if unseen_groups is not None and (both := set(unseen_groups) & set(groups)):
            logger.warning("%d groups, such as patients, have training and held-out images.", len(both))
        if num_seen:
            logger.warning("%d of the held-out images are training images: they say nothing.", num_seen)
        found["held_out"] = search_copies(unseen, known, unseen_groups, None if unseen_groups is None else groups)
    real = found[calibrate_on.replace(" ", "_")]
    gate = CopyGate.of(known, real, extractor, false_alarms)
    closest: tuple[ClosePair, ...] = ()
    if synthetic is not None:
        found["synthetic"] = search_copies(views["synthetic"], known)
        closest = _closest(found["synthetic"].balanced(real), views["synthetic"], known, gate.threshold, num_pairs)
    figures = {
        name: summarize(found[name].balanced(real), gate.threshold, spacing) if name in found else None
        for name in sets
    }
    tokens = None
    if conditioner is not None:
        of_sets = {} if drawn is None else {"synthetic": drawn}
        for name, own in views.items():
            if name not in of_sets:  # of the images that could be read
                images = sets[name] if isinstance(sets[name], Tensor) else sets[name].select(own.upright.keys)
                of_sets[name] = embed_images(conditioner, images, batch_size)
        tokens = compare_tokens(
            **of_sets,
            drawn=drawn is not None,
            training_groups=groups,
            held_out_groups=unseen_groups,
            false_alarms=false_alarms,
            calibrate_on=calibrate_on,
        )
    result = MemorizationResult(
        spec=extractor.spec,
        false_alarms=false_alarms,
        threshold=gate.threshold,
        calibrated_on=calibrate_on,
        gate=gate.fingerprint(),
        planted=_plant(training, known, real, gate, num_planted, batch_size),
        closest=closest,
        held_out_in_training=num_seen,
        tokens=tokens,
        **figures,
    )
    return MemorizationStudy(result, gate)


def _plant(
    training: Images, views: ImageViews, real: Distances, gate: CopyGate, count: int, batch_size: int
) -> tuple[PlantedFigures, ...]:
    """Tamper with training images, evenly spread over their order, and search for them."""
    keys = views.upright.keys  # of those that can be read
    rows = evenly_spread(len(keys), count).tolist()
    images = training[rows] if isinstance(training, Tensor) else stack_images(training.select([keys[i] for i in rows]))

    def distances(copies: Tensor) -> Tensor:
        copied = extract_views(gate.extractor, copies.clamp(0, 1), batch_size)
        return search_copies(copied, views).balanced(real).smallest

    return find_planted(PLANTED, images, distances, gate.threshold)


def _closest(
    found: Distances, synthetic: ImageViews, training: ImageViews, threshold: float, count: int
) -> tuple[ClosePair, ...]:
    distance, (index, mirrored) = found.smallest, found.nearest
    return tuple(
        ClosePair(
            key=synthetic.upright.keys[row],
            training_key=training.upright.keys[int(index[row])],
            relative_distance=distance[row].item(),
            mirrored=bool(mirrored[row]),
            copy=distance[row].item() < threshold,
        )
        for row in distance.sort(stable=True).indices[:count].tolist()
    )
