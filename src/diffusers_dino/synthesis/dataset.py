"""The set that finished shards make: complete, labelled, and with a record of how it was made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..conditioner import DinoImageConditioner
from ..data import ImageDataset, Preprocessing, open_images
from ..data.labels import PROBABILITIES
from ..data.sharding.manifest import MANIFEST, ShardError, read_manifest, verify_shards, write_manifest
from ..data.stores.walk import WORK
from ..familiarity import UNLIKE
from ..files import is_csv_of, write_csv
from ..sheets import contact_sheet
from .plan import LABEL_SEPARATOR, Plan, PlannedImage, SynthesisError
from .plan_file import load_plan
from .shards import SPLIT, ShardRecord, read_record, shard_path
from .tokens import TokenStore

__all__ = [
    "LABELS",
    "SyntheticSet",
    "check_left_out",
    "complete_set",
    "draw_examples",
    "finished_set",
    "label_columns",
    "label_rows",
]

LABELS = "labels.csv"

_READ_AT_ONCE = 2**30  # bytes of shards that are compared whenever a set is opened: a second or two


@dataclass(frozen=True)
class SyntheticSet:
    """A complete folder of synthetic images, what was planned, and its manifest.

    The manifest has the shards, and under `lineage` what they were made from and how.
    """

    folder: Path
    plan: Plan
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> SyntheticSet:
        """Open a folder that `synthesise` has completed, and compare what is there with its plan and manifest.

        Shards of more than 1 GB in all are compared only by their sizes, unless you ask to `verify` every byte.

        Raises:
            FileNotFoundError: If the set is not complete.
            SynthesisError: If a file was changed or has gone since. The message names it, and says what to do.
        """
        found = cls(Path(folder), load_plan(folder), read_manifest(folder))
        if problems := [*_foreign(found), *_lost(found, verify)]:
            raise SynthesisError(
                f"{folder} is not the set that was made: {'; '.join(problems[:5])}. Move away what is not the set's, "
                "and give the command that made it again: what is missing or damaged is then made anew."
            )
        return found

    def __repr__(self) -> str:
        return f"SyntheticSet({str(self.folder)!r}: {len(self)} images by {self.plan.strategy})"

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


def draw_examples(made: SyntheticSet, sources: ImageDataset | None, count: int = 8) -> PIL.Image.Image:
    """Draw the first `count` images of a set beside their sources: rows of source | synthetic, and | source if two.

    Images of a prior have no source: theirs are rows of one.
    """
    planned = [image for image, _ in zip(made.planned(), range(count), strict=False)]
    if made.plan.strategy == "prior":
        shown = made.images()
        return contact_sheet([shown[number]["image"] for number in range(len(planned))])
    chosen = sources.select(sorted({key for image in planned for key in image.sources}))
    place = {key: number for number, key in enumerate(chosen.keys)}
    ends = [[chosen[place[key]]["image"] for key in keys] for keys in zip(*(p.sources for p in planned), strict=True)]
    synthetic = made.images()
    return contact_sheet(ends[0], [synthetic[number]["image"] for number in range(len(planned))], *ends[1:])


def finished_set(folder: Path) -> SyntheticSet | None:
    """The set of a folder if it is complete, byte for byte; None if there is work left, such as a shard that is gone.

    SynthesisError if files in it are not the set's: to make them anew could lose what somebody has written.
    """
    if not (folder / MANIFEST).is_file():
        return None
    try:
        found = SyntheticSet(folder, load_plan(folder), read_manifest(folder))
    except ShardError:
        return None
    if foreign := _foreign(found):
        raise SynthesisError(f"{folder}: {'; '.join(foreign)}. Move it away or delete it, and go on.")
    return None if _lost(found, verify=True) else found


def _foreign(found: SyntheticSet) -> list[str]:
    """What in the folder of a set was put there or changed by somebody, one sentence for each file."""
    folder, plan = found.folder, found.plan
    ours = {shard_path(folder, number).name for number in range(plan.num_shards)}
    foreign = [f"{tar.name} is not of this set" for tar in sorted(folder.glob("*.tar")) if tar.name not in ours]
    if not _manifest_problem(found) and not _may_write_labels(plan, set(found.left_out), folder):
        foreign.append(f"{LABELS} was changed")
    return foreign


def _lost(found: SyntheticSet, verify: bool) -> list[str]:
    """What of a set is missing or damaged, so that it has to be made again, one sentence for each file."""
    if problem := _manifest_problem(found):
        return [problem]
    sizes = {found.folder / shard["name"]: shard["bytes"] for shard in found.manifest["shards"]}
    problems = [] if (found.folder / LABELS).is_file() else [f"{LABELS} is missing"]
    if verify or sum(sizes.values()) <= _READ_AT_ONCE:
        return problems + verify_shards(found.folder)
    cut = (path.name for path, size in sizes.items() if not path.is_file() or path.stat().st_size != size)
    return problems + [f"{name} is missing or cut" for name in cut]


def _manifest_problem(found: SyntheticSet) -> str | None:
    """What is wrong with a manifest beside its plan, from which the names and lengths of all shards follow."""
    plan, manifest = found.plan, found.manifest
    try:
        prepared = Preprocessing(**manifest["preprocessing"]) == _preprocessing(plan)
        left_out = set(found.left_out)
        expected = [
            (shard_path(found.folder, number).name, len(set(plan.shard(number)) - left_out), SPLIT)
            for number in range(plan.num_shards)
        ]
        entries = [(shard["name"], shard["samples"], shard["split"]) for shard in manifest["shards"]]
        sound = all(isinstance(shard["bytes"], int) and shard["sha256"] for shard in manifest["shards"])
        fits = prepared and entries == expected and manifest["lineage"]["plan"] == plan.digest
        fits = fits and all(0 <= index < len(plan) for index in left_out)
    except (KeyError, TypeError, ValueError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None if sound and fits else f"{MANIFEST} is not that of its plan"


def check_left_out(plan: Plan, left_out: int, max_left_out: float) -> None:
    """Raise `SynthesisError` if the gate refused more images than is tolerated, or all."""
    if left_out == len(plan):
        raise SynthesisError(
            f"The gate refused all {left_out} images in {plan.settings.max_attempts} attempts each: its threshold is "
            "too strict for this model, or it was made for other images."
        )
    if left_out > max_left_out * len(plan):
        raise SynthesisError(
            f"The gate refused at least {left_out} of {len(plan)} images in all {plan.settings.max_attempts} "
            f"attempts, more than the tolerated {max_left_out:.1%} (max_left_out). Raise max_left_out to go on with "
            "fewer images, or check the gate's threshold; another gate needs another output folder."
        )


def complete_set(
    plan: Plan, folder: Path, max_left_out: float = 0.05, conditioner: DinoImageConditioner | None = None
) -> SyntheticSet:
    """Write `labels.csv` and, last, the manifest; then delete what is no longer needed. Only one process does this.

    A conditioner with statistics of its training images tells how many sources are unlike them.
    """
    found = [read_record(plan, number, folder) for number in range(plan.num_shards)]
    records = [record for record in found if record is not None]
    if len(records) < len(found):
        raise SynthesisError(
            f"{len(found) - len(records)} of {plan.num_shards} shards have not been made, such as {found.index(None)}."
        )
    left_out = {index for record in records for index in record.left_out}
    check_left_out(plan, len(left_out), max_left_out)
    if not _may_write_labels(plan, left_out, folder):
        raise SynthesisError(f"{folder / LABELS} is not the set's: rename it, and go on.")
    write_csv(folder / LABELS, label_columns(plan), label_rows(plan, left_out))
    lineage = _lineage(plan, records)
    lineage["sources"] |= _unlike_sources(plan, TokenStore(plan, folder), conditioner)
    write_manifest(folder, _preprocessing(plan), [record.shard for record in records], lineage)
    shutil.rmtree(folder / WORK)
    return SyntheticSet(folder, plan, read_manifest(folder))


def _unlike_sources(plan: Plan, tokens: TokenStore, conditioner: DinoImageConditioner | None) -> dict[str, Any]:
    """How many sources are unlike the images that the model knows; empty if that cannot be told."""
    if conditioner is None or conditioner.token_statistics is None or not plan.keys:
        return {}
    if not all(tokens.has_part(number) for number in range(tokens.num_parts)):
        return {}
    blocks = np.array_split(np.arange(len(plan.keys)), tokens.num_parts)
    unlike = sum(int((conditioner.familiarity_of(tokens[block]) < UNLIKE).sum()) for block in blocks)
    return {"unlike": unlike, "count": len(plan.keys), "familiarity_below": UNLIKE}


def _preprocessing(plan: Plan) -> Preprocessing:
    """How the images of a bound plan are prepared: as its sources, at the model's size."""
    return Preprocessing(**{**plan.made_with["preprocessing"], "size": plan.made_with["image_size"]})


def label_columns(plan: Plan) -> tuple[str, ...]:
    """The header of `labels.csv`. Soft labels have another column, so that none is taken for a hard one."""
    return ("key", "labels" if plan.exponent is None else PROBABILITIES, "strategy", "sources", "fraction")


def label_rows(plan: Plan, left_out: set[int]) -> Iterator[tuple[str, ...]]:
    """The rows of `labels.csv`, one for each image that is not left out; unknown labels are blank.

    Soft labels are `NAME=PROBABILITY`, see `diffusers_dino.data.labels.SoftLabelTable`.
    """
    for image in plan:
        if image.index not in left_out:
            named = (f"{name}={value!r}" for name, value in (image.probabilities or {}).items())
            labels = LABEL_SEPARATOR.join(image.labels or named)
            yield image.key, labels, plan.strategy, LABEL_SEPARATOR.join(image.sources), str(image.fraction)


def _may_write_labels(plan: Plan, left_out: set[int], folder: Path) -> bool:
    """Whether a folder has no `labels.csv`, or one with the rows that it will have."""
    path = folder / LABELS
    if not path.is_file():
        return not path.is_dir()  # a pipe is replaced, and never read
    return is_csv_of(path, label_columns(plan), label_rows(plan, left_out))


def _lineage(plan: Plan, records: list[ShardRecord]) -> dict[str, Any]:
    """What a set was made from and how, for the manifest."""
    from .. import __version__

    environments = {json.dumps(record.environment, sort_keys=True) for record in records}
    description = plan.describe()
    made_with, _ = description.pop("made_with"), description.pop("label_sets")
    drawn = {"prior": made_with["prior"]} if "prior" in made_with else {}
    return {
        "kind": "synthetic",
        "plan": plan.digest,
        **description,
        "model": made_with["model"],
        **drawn,
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
