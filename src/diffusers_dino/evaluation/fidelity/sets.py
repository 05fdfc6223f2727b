"""Which images a model generates from, and which real images of other patients it is compared with."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch

from ...data import ImageDataset
from ...metrics import FeatureSet
from ...seeds import generator_for
from ..controls import rows_in, split_in_halves

__all__ = ["FidelitySets", "choose_sets", "require_disjoint"]

logger = logging.getLogger(__name__)


class FidelitySets(NamedTuple):
    """Images that the model generates from, and real images of other patients.

    Attributes:
        patients: The patient of each key, whom the bootstrap draws whole; None draws images.
        places: Where sources and reference come from. Only names of kept features depend on it.
    """

    sources: ImageDataset
    reference: ImageDataset
    patients: Mapping[str, str] | None = None
    places: tuple[str, str] = ("", "")


def choose_sets(
    images: ImageDataset,
    reference: ImageDataset | None = None,
    *,
    reference_keys: Collection[str] | None = None,
    patients: Mapping[str, str] | None = None,
    num_sources: int | None = None,
    num_reference: int | None = None,
    seed: int = 0,
    places: tuple[str, str] = ("", ""),
) -> FidelitySets:
    """Share images out to sources and reference; with `patients` no patient is in both.

    Args:
        images: The sources, and the reference too unless that is given.
        reference: Other images to compare with; then all `images` are sources.
        reference_keys: Those of `images` to compare with, such as the training images; all others are sources.
            Without these and `reference`, one half of the patients is compared with the other.
        patients: The patient of each key of both data sets.
        num_sources, num_reference: Draw so many of each at random.
        seed: Of the halves and the draws.
        places: See `FidelitySets`.

    Raises:
        KeyError: If a reference key is not in `images`.
        ValueError: If nothing is left on one side, or the reference is given twice.
    """
    if reference is not None and reference_keys is not None:
        raise ValueError("Give the reference as a data set or as keys of the images, not both.")
    if patients is None:
        logger.warning("Patients are not known: images of one patient may be on both sides of the comparison.")
    known = images if reference is None else reference
    if reference is not None:
        sources, real = images.keys, known.keys
    elif reference_keys is not None:
        real = images.select(reference_keys).keys
        listed = set(real)
        sources = [key for key in images.keys if key not in listed]
    else:
        first = split_in_halves([patients[key] if patients else key for key in images.keys], seed).tolist()
        sources, real = ([k for k, inside in zip(images.keys, first, strict=True) if inside == s] for s in (1, 0))
    if patients and (left_out := {patients[key] for key in real} & {patients[key] for key in sources}):
        sources = [key for key in sources if patients[key] not in left_out]
        logger.warning("Left out the sources of %d patients who are in the reference, too.", len(left_out))
    sources, real = _draw(sources, num_sources, seed), _draw(real, num_reference, seed)
    if not sources or not real:
        raise ValueError(f"There are {len(sources)} sources and {len(real)} images in the reference.")
    return FidelitySets(images.select(sources), known.select(real), patients, places)


def require_disjoint(sources: FeatureSet, reference: FeatureSet) -> None:
    """ValueError if an image of one key has the same features in both sets: a model would be rewarded for copying.

    So it is if half of the sources have the features of images of other keys, as those of a copy of the folder have;
    fewer are warned of, since data sets hold duplicates.
    """
    shared = sorted(set(sources.keys) & set(reference.keys))
    if shared and (sources.select(shared).features == reference.select(shared).features).all(dim=1).any():
        raise ValueError(
            f"Images are in the reference and among the sources, such as {shared[0]!r} ({len(shared)} keys are in "
            "both): give other sources."
        )
    same = rows_in(sources.features, reference.features)
    message = (
        f"{int(same.sum())} of the {len(sources)} sources are images of the reference under other names, such as "
        f"{sources.keys[int(same.int().argmax())]!r}"
    )
    if 2 * same.sum() >= len(sources):
        raise ValueError(f"{message}: give other sources.")
    if same.any():
        logger.warning("%s: leave duplicates out.", message)


def _draw(keys: Sequence[str], count: int | None, seed: int) -> list[str]:
    if count is not None and count < 1:
        raise ValueError(f"At least one image must be drawn, got {count}.")
    if count is None or count >= len(keys):
        return list(keys)
    return [keys[i] for i in torch.randperm(len(keys), generator=generator_for(seed, "subset"))[:count].tolist()]
