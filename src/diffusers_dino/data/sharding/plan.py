"""What a folder of shards is made of and how, fixed once, so that a restart ends with the same bytes."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...files import atomic_write, write_json
from ..images.encoding import Encoding
from ..splits import SplitRule, assign_splits, link_patients
from .duplicates import find_duplicates
from .parts import Item, Sample
from .writing import PlannedShard, ShardError, plan_shards

__all__ = ["Plan", "PlanRule", "check_same", "configuration_of", "freeze", "make_plan", "read_plan", "write_csv"]

_DUPLICATES = "duplicates.csv"
_PLAN = "plan.json"


@dataclass(frozen=True)
class PlanRule:
    """How prepared images are shared out to shards."""

    splits: SplitRule
    shard_size: int
    drop_duplicates: Literal["none", "exact", "perceptual"]
    duplicate_distance: int


@dataclass(frozen=True)
class Plan:
    """Which sample goes into which shard, and what was found on the way.

    Attributes:
        shards: The shards, samples by number.
        duplicates: Kind, two sources and the number of pairs.
        dropped: How many copies are left out.
        largest_group: Samples of the largest group that no split may tear.
    """

    shards: list[PlannedShard]
    duplicates: list[tuple[str, str, str, int]]
    dropped: int
    largest_group: int


def configuration_of(encoding: Encoding, rule: PlanRule) -> dict[str, Any]:
    """All that decides over the bytes of the shards, beside the images themselves."""
    quality = encoding.quality if encoding.format == "jpg" else None
    splits = {f"splits_{name}": value for name, value in asdict(rule.splits).items()}
    stored = {"format": encoding.format, "quality": quality, "shard_size": rule.shard_size}
    duplicates = {"drop_duplicates": rule.drop_duplicates, "duplicate_distance": rule.duplicate_distance}
    return asdict(encoding.preprocessing) | stored | splits | duplicates


def check_same(begun_with: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    """Refuse to go on in a folder that was begun in another way."""
    changed = [name for name in begun_with | now if begun_with.get(name) != now.get(name)]
    if changed:
        details = "; ".join(f"{name} was {begun_with.get(name)}, is {now.get(name)}" for name in changed)
        raise ShardError(
            f"{output} was begun in another way: {details}. Go on as it was begun, or give another --output_dir."
        )


def freeze(configuration: dict[str, Any], items: Sequence[Item], part_size: int, work: Path, output: Path) -> None:
    """Note what a folder is made of when it is begun, and compare when it is gone on with."""
    digests: dict[str, Any] = {}
    for item in items:
        record = item.record
        facts = (item.key, item.patient, record.labels, record.uncertain, record.view, record.split)
        digests.setdefault(record.source, hashlib.sha256()).update(repr(facts).encode())
    images = {f"fingerprint of {name}'s images, labels and salt": d.hexdigest()[:16] for name, d in digests.items()}
    frozen = configuration | {"part_size": part_size} | images
    path = work / "configuration.json"
    if path.is_file():
        check_same(json.loads(path.read_bytes()), frozen, output)
    else:
        write_json(path, frozen)


def read_plan(work: Path) -> Plan | None:
    """The plan that an earlier run made, if it came that far."""
    path = work / _PLAN
    if not path.is_file():
        return None
    content = json.loads(path.read_bytes())
    return Plan(**content | {"shards": [PlannedShard(**shard) for shard in content["shards"]]})


def make_plan(samples: Sequence[Sample], rule: PlanRule, output: Path, work: Path) -> Plan:
    """Find duplicates, share patients out to splits and samples to shards."""
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
    plan = Plan(
        plan_shards([s.key for s in samples], used, rule.shard_size, rule.splits.seed),
        [(*key, count) for key, count in sorted(counts.items())],
        len(dropped),
        int(np.bincount(groups).max(initial=0)),
    )
    content = {entry.name: getattr(plan, entry.name) for entry in fields(Plan)}
    write_json(work / _PLAN, content | {"shards": [asdict(shard) for shard in plan.shards]}, indent=None)
    return plan


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
