"""What a folder of shards is made of and how, fixed once, so that a restart ends with the same bytes."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...files import read_json, write_csv, write_json
from ...fingerprints import hash_of
from ...seeds import derive_seed
from ..images.encoding import Encoding
from ..splits import SPLITS, SplitRule, assign_splits, link_patients
from .duplicates import MAX_DISTANCE, find_duplicates
from .manifest import ShardError
from .parts import Item, Sample

__all__ = [
    "PLAN",
    "PlanRule",
    "PlannedShard",
    "ShardPlan",
    "configuration_of",
    "files_of",
    "images_of",
    "make_plan",
    "plan_shards",
    "read_plan",
    "warn_of_splits",
]

logger = logging.getLogger(__name__)

_DUPLICATES = "duplicates.csv"
PLAN = "plan.json"


@dataclass(frozen=True)
class PlanRule:
    """How prepared images are shared out to shards.

    Args:
        splits: Which patients are kept for validation and testing.
        shard_size: Largest number of samples in a shard.
        drop_duplicates: Which copies of an image to leave out; the first of the copies stays.
        duplicate_distance: Differing bits, of 256, up to which images are near duplicates, in [0, 15].
    """

    splits: SplitRule = field(default_factory=SplitRule)
    shard_size: int = 1000
    drop_duplicates: Literal["none", "exact", "perceptual"] = "none"
    duplicate_distance: int = MAX_DISTANCE

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {self.shard_size}")
        if self.drop_duplicates not in ("none", "exact", "perceptual"):
            raise ValueError(f"drop_duplicates must be none, exact or perceptual, got {self.drop_duplicates!r}")
        if not 0 <= self.duplicate_distance <= MAX_DISTANCE:
            raise ValueError(f"duplicate_distance must be in [0, {MAX_DISTANCE}], got {self.duplicate_distance}")


@dataclass(frozen=True)
class PlannedShard:
    """Which samples go into a shard, in which order: numbers of images in the order in which the sources list them."""

    name: str
    split: str
    samples: list[int]


@dataclass(frozen=True)
class ShardPlan:
    """Which sample goes into which shard, and what was found on the way.

    `duplicates`: kind, two sources and the number of pairs. `dropped`: copies that are left out. `largest_group`:
    samples of the largest group that no split may tear. `samples`: a digest of the keys that the numbers stand for;
    empty in plans of older versions.
    """

    shards: list[PlannedShard]
    duplicates: list[tuple[str, str, str, int]]
    dropped: int
    largest_group: int
    samples: str = ""

    def split_of(self) -> dict[int, str]:
        """The split of each sample that is in a shard, by number."""
        return {number: shard.split for shard in self.shards for number in shard.samples}


def configuration_of(encoding: Encoding, rule: PlanRule) -> dict[str, Any]:
    """All that decides the bytes of the shards, except the images themselves."""
    quality = encoding.quality if encoding.format == "jpg" else None
    splits = {f"splits_{name}": value for name, value in asdict(rule.splits).items()}
    stored = {"format": encoding.format, "quality": quality, "shard_size": rule.shard_size}
    duplicates = {"drop_duplicates": rule.drop_duplicates, "duplicate_distance": rule.duplicate_distance}
    return asdict(encoding.preprocessing) | stored | splits | duplicates


def images_of(items: Sequence[Item]) -> dict[str, str]:
    """A fingerprint for each source, by which a restart notices other images, labels or another salt."""
    facts = [(i.key, i.patient, i.record.labels, i.record.uncertain, i.record.view, i.record.split) for i in items]
    return _digest("images, labels and salt", items, facts)


def files_of(items: Sequence[Item], marks: Iterable[str]) -> dict[str, str]:
    """A fingerprint for each source, by which a finished folder notices other files of the same names."""
    pairs = zip(items, marks, strict=True)
    facts = [(item.key, mark, item.record.raw, item.record.invert) for item, mark in pairs]
    return _digest("files", items, facts)


def _digest(what: str, items: Sequence[Item], facts: Sequence[Any]) -> dict[str, str]:
    digests: dict[str, Any] = {}
    for item, fact in zip(items, facts, strict=True):
        digests.setdefault(item.record.source, hashlib.sha256()).update(repr(fact).encode())
    return {f"fingerprint of {name}'s {what}": digest.hexdigest()[:16] for name, digest in digests.items()}


def read_plan(samples: Sequence[Sample], work: Path) -> ShardPlan | None:
    """The plan that an earlier run made, if it came that far; `ShardError` if it is damaged or of other samples."""
    path = work / PLAN
    if not path.is_file():
        return None
    try:
        content = read_json(path, limit=1 << 30)
        plan = ShardPlan(**content | {"shards": [PlannedShard(**shard) for shard in content["shards"]]})
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is damaged. Run the same command with retry_unreadable: it plans anew.") from error
    if plan.samples not in ("", _digest_of(samples)):  # by its numbers, patients would come into other splits
        raise ShardError(
            f"{path} was made when other images could be read. Run the same command with retry_unreadable: it plans "
            "anew."
        )
    return plan


def _digest_of(samples: Sequence[Sample]) -> str:
    return hash_of(*(sample.key for sample in samples))[:16]


def make_plan(samples: Sequence[Sample], rule: PlanRule, output: Path, work: Path) -> ShardPlan:
    """Find duplicates, assign patients to splits and samples to shards."""
    hashes = np.frombuffer(bytes.fromhex("".join(s.hash for s in samples)), np.uint8).reshape(len(samples), -1)
    found = find_duplicates([s.digest for s in samples], hashes, rule.duplicate_distance)
    dropped = set() if rule.drop_duplicates == "none" else found.copies(near=rule.drop_duplicates == "perceptual")
    groups = link_patients([s.patient for s in samples], found.pairs)
    splits = assign_splits([s.patient for s in samples], [s.split for s in samples], groups, rule.splits)
    rows, counts = [], Counter()
    for (first, second), distance in zip(found.pairs.tolist(), found.distance.tolist(), strict=True):
        kind, one, copy = "exact" if distance < 0 else "perceptual", samples[first], samples[second]
        rows.append([kind, max(distance, 0), one.key, copy.key, one.source, copy.source, second in dropped])
        counts[(kind, *sorted((one.source, copy.source)))] += 1
    header = ["kind", "distance", "key", "copy", "source", "source_of_copy", "copy_dropped"]
    write_csv(output / _DUPLICATES, header, rows)
    used = [None if number in dropped else split for number, split in enumerate(splits)]
    plan = ShardPlan(
        plan_shards([s.key for s in samples], used, rule.shard_size, rule.splits.seed),
        [(*key, count) for key, count in sorted(counts.items())],
        len(dropped),
        int(np.bincount(groups).max(initial=0)),
        _digest_of(samples),
    )
    write_json(work / PLAN, asdict(plan), indent=None)
    return plan


def plan_shards(keys: Sequence[str], splits: Sequence[str | None], shard_size: int, seed: int) -> list[PlannedShard]:
    """Assign samples, by their keys, to shards of their splits; None as a split leaves one out.

    Samples are shuffled, so that each shard holds all sources: training that shuffles within a few shards then sees a
    mixture. Shards of a split differ by at most one sample.
    """
    order = {key: derive_seed(seed, "shard", key) for key in keys}
    planned = []
    for split in SPLITS:
        members = [number for number, given in enumerate(splits) if given == split]
        members.sort(key=lambda number: (order[keys[number]], keys[number]))
        count = -(-len(members) // shard_size)
        bounds = [len(members) * i // count for i in range(count + 1)] if count else []
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            planned.append(PlannedShard(f"{split}-{i:06d}.tar", split, members[start:end]))
    return planned


def warn_of_splits(samples: Sequence[Sample], plan: ShardPlan, rule: PlanRule) -> None:
    """Warn where ids of patients do not seem to tell people apart, and of splits without images."""
    advice = "describe the source in a YAML file whose `patient` names another column, or a part of the path"
    for source in dict.fromkeys(sample.source for sample in samples):
        of_source = [sample for sample in samples if sample.source == source]
        ((_, most),) = Counter(sample.patient for sample in of_source).most_common(1)
        total, nameless = len(of_source), sum(bool(sample.nameless) for sample in of_source)
        if most > 1 and (most == total or (most >= 5 and most > total / 2)):
            logger.warning(
                "%s: %d of %d images have one patient id, and so one split. If ids were removed, %s.",
                *(source, most, total, advice),
            )
        if nameless:
            logger.warning(
                "%s: %d of %d images are DICOM files without a patient id, and count as a patient each. Images of one "
                "person may be in several splits: %s.",
                *(source, nameless, total, advice),
            )
    asked = {"train": 1, "validation": rule.splits.validation, "test": rule.splits.test}
    for split in sorted({split for split, share in asked.items() if share} - {shard.split for shard in plan.shards}):
        logger.warning("No image is in the split %r.", split)
