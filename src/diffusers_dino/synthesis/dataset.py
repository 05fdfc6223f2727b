"""The set that finished shards make: complete, labelled, and with a record of how it was made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from ..data import ImageDataset, Preprocessing, open_images
from ..data.sharding.manifest import MANIFEST, read_manifest, write_manifest
from ..files import write_csv
from ..sheets import contact_sheet
from .plan import LABEL_SEPARATOR, Plan, PlannedImage, SynthesisError, load_plan
from .shards import ShardRecord, read_record
from .tokens import WORK

__all__ = ["LABELS", "SyntheticSet", "check_left_out", "complete_set", "draw_examples", "finished_set"]

LABELS = "labels.csv"


@dataclass(frozen=True)
class SyntheticSet:
    """A complete folder of synthetic images, what was planned, and its manifest.

    The manifest has the shards, and under `lineage` what they were made from and how.
    """

    folder: Path
    plan: Plan
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> SyntheticSet:
        """Open a folder that `synthesise` has completed; FileNotFoundError if it is not complete."""
        manifest = read_manifest(folder)
        return cls(Path(folder), load_plan(folder), manifest)

    def __len__(self) -> int:
        return sum(shard["samples"] for shard in self.manifest["shards"])

    @property
    def left_out(self) -> list[int]:
        """Numbers of the planned images that the gate refused in every attempt."""
        return [int(key.rpartition("-")[2]) for key in self.manifest["lineage"]["gate"]["left_out"]]

    def planned(self) -> Iterator[PlannedImage]:
        """The images that the set has, in the order of the shards."""
        missing = set(self.left_out)
        return (planned for planned in self.plan if planned.index not in missing)

    def images(self, **options: Any) -> ImageDataset:
        """The images in the same order, with their pixels as they are stored; options as for `open_images`."""
        return open_images(self.folder, Preprocessing(**self.manifest["preprocessing"]), **options)


def draw_examples(made: SyntheticSet, sources: ImageDataset, count: int = 8) -> PIL.Image.Image:
    """Draw the first `count` images of a set beside their sources: rows of source | synthetic, and | source if two."""
    planned = [image for image, _ in zip(made.planned(), range(count), strict=False)]
    chosen = sources.select(sorted({key for image in planned for key in image.sources}))
    place = {key: number for number, key in enumerate(chosen.keys)}
    ends = [[chosen[place[key]]["image"] for key in keys] for keys in zip(*(p.sources for p in planned), strict=True)]
    synthetic = made.images()
    return contact_sheet(ends[0], [synthetic[number]["image"] for number in range(len(planned))], *ends[1:])


def finished_set(folder: Path) -> SyntheticSet | None:
    """The set of a folder if it is complete; None if there is work left, such as a shard that is gone or cut short."""
    if not (folder / MANIFEST).is_file():
        return None
    found = SyntheticSet.open(folder)
    paths = {folder / shard["name"]: shard["bytes"] for shard in found.manifest["shards"]}
    return found if all(path.is_file() and path.stat().st_size == size for path, size in paths.items()) else None


def check_left_out(plan: Plan, left_out: int, max_left_out: float) -> None:
    """Raise `SynthesisError` if the gate refused more images than is tolerated."""
    if left_out > max_left_out * len(plan):
        raise SynthesisError(
            f"The gate refused at least {left_out} of {len(plan)} images in all {plan.settings.max_attempts} "
            f"attempts, more than the tolerated {max_left_out:.1%} (max_left_out). Raise max_left_out to go on with "
            "fewer images, or check the gate's threshold; another gate needs another output folder."
        )


def complete_set(plan: Plan, folder: Path, max_left_out: float = 0.05) -> SyntheticSet:
    """Write `labels.csv` and, last, the manifest; then delete what is no longer needed. Only one process does this."""
    found = [read_record(plan, number, folder) for number in range(plan.num_shards)]
    records = [record for record in found if record is not None]
    if len(records) < len(found):
        raise SynthesisError(
            f"{len(found) - len(records)} of {plan.num_shards} shards have not been made, such as {found.index(None)}."
        )
    left_out = {index for record in records for index in record.left_out}
    check_left_out(plan, len(left_out), max_left_out)
    rows = (  # those of unlabelled sources have a blank
        (p.key, LABEL_SEPARATOR.join(p.labels or ()), plan.strategy, LABEL_SEPARATOR.join(p.sources), p.fraction)
        for p in plan
        if p.index not in left_out
    )
    write_csv(folder / LABELS, ("key", "labels", "strategy", "sources", "fraction"), rows)
    preprocessing = Preprocessing(**{**plan.made_with["preprocessing"], "size": plan.made_with["image_size"]})
    write_manifest(folder, preprocessing, [record.shard for record in records], _lineage(plan, records))
    shutil.rmtree(folder / WORK)
    return SyntheticSet.open(folder)


def _lineage(plan: Plan, records: list[ShardRecord]) -> dict[str, Any]:
    """What a set was made from and how, for the manifest."""
    from .. import __version__

    environments = {json.dumps(record.environment, sort_keys=True) for record in records}
    description = plan.describe()
    made_with, _ = description.pop("made_with"), description.pop("label_sets")
    return {
        "kind": "synthetic",
        "plan": plan.digest,
        **description,
        "model": made_with["model"],
        "sources": {"fingerprint": made_with["source_pixels"], "preprocessing": made_with["preprocessing"]},
        "gate": {
            "fingerprint": made_with["gate"],
            "refused": sum(record.refused for record in records),
            "redrawn": sum(len(record.redrawn) for record in records),
            "left_out": [plan[index].key for record in records for index in record.left_out],
        },
        "diffusers_dino": __version__,
        "environments": [json.loads(environment) for environment in sorted(environments)],
    }
