"""The end of a synthesis: from finished shards to a set that is complete, labelled and says how it was made."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import ImageDataset, Preprocessing, open_images
from ..data.sharding.manifest import MANIFEST, read_manifest, write_manifest
from ..files import PARTIAL, atomic_write
from .plan import LABEL_SEPARATOR, Plan, PlannedImage
from .plan_files import load_plan
from .settings import SynthesisError
from .shards import UnitRecord, read_record

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["LABELS", "SyntheticSet", "WorkFolders", "check_left_out", "complete_set", "finished_set", "only_run"]

LABELS = "labels.csv"
_COLUMNS = ("key", "labels", "strategy", "sources", "fraction")


@dataclass(frozen=True)
class WorkFolders:
    """Where a synthesis keeps what.

    Attributes:
        output: Shards, plan, labels and manifest.
    """

    output: Path

    @property
    def work(self) -> Path:
        """What is needed until the set is complete."""
        return self.output / ".work"

    @property
    def tokens(self) -> Path:
        """Tokens of the sources."""
        return self.work / "tokens"

    @property
    def records(self) -> Path:
        """A record of each finished shard; they stay, so that one that is lost later can be made again alone."""
        return self.output / ".records"

    def make(self) -> None:
        """Make them."""
        for folder in (self.output, self.records, self.work, self.tokens):
            folder.mkdir(exist_ok=True)


@dataclass(frozen=True)
class SyntheticSet:
    """A complete folder of synthetic images.

    Attributes:
        folder: Where it is.
        plan: What was planned.
        manifest: Shards, and under `lineage` what they were made from and how.
    """

    folder: Path
    plan: Plan
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a folder that `synthesise` has completed.

        Raises:
            FileNotFoundError: If it is not complete.
            SynthesisError: If its plan was changed.
        """
        manifest = read_manifest(folder)
        return cls(Path(folder), load_plan(folder), manifest)

    def __len__(self) -> int:
        return sum(shard["samples"] for shard in self.manifest["shards"])

    @property
    def left_out(self) -> list[int]:
        """Numbers of planned images that the gate refused in every attempt."""
        return [int(key.rpartition("-")[2]) for key in self.manifest["lineage"]["gate"]["left_out"]]

    def planned(self) -> Iterator[PlannedImage]:
        """The images that are there, in the order of the shards."""
        missing = set(self.left_out)
        return (planned for planned in self.plan if planned.index not in missing)

    def images(self, **options: Any) -> ImageDataset:
        """The images in the same order, their pixels as they are stored; options as in `open_images`."""
        return open_images(self.folder, Preprocessing(**self.manifest["preprocessing"]), **options)


@contextmanager
def only_run(folders: WorkFolders) -> Iterator[None]:
    """Hold a lock on the folders, which ends with this process however that ends, and clear away what was killed.

    Raises:
        SynthesisError: If another run holds it.
    """
    with open(folders.records / "lock", "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SynthesisError(f"Another run is at work in {folders.output}: wait for it, or stop it.") from error
        except (ImportError, OSError):  # not on Windows, nor on every network's file system
            pass
        for folder in (folders.output, folders.records, folders.tokens):
            for leftover in folder.glob(f".*{PARTIAL}"):
                leftover.unlink(missing_ok=True)
        yield


def finished_set(folders: WorkFolders) -> SyntheticSet | None:
    """The set of a folder that is complete; None if there is work left, also where a shard is gone or cut short."""
    if not (folders.output / MANIFEST).is_file():
        return None
    found = SyntheticSet.open(folders.output)
    paths = {folders.output / shard["name"]: shard["bytes"] for shard in found.manifest["shards"]}
    return found if all(path.is_file() and path.stat().st_size == size for path, size in paths.items()) else None


def check_left_out(plan: Plan, left_out: int, max_left_out: float) -> None:
    """Raise `SynthesisError` if the gate refused more images than is tolerated."""
    if left_out > max_left_out * len(plan):
        raise SynthesisError(
            f"The gate refused at least {left_out} of {len(plan)} images in all {plan.settings.max_attempts} "
            f"attempts, more than the tolerated {max_left_out:.1%} (max_left_out). Raise that to go on with fewer "
            "images, or look at the gate's threshold; another gate needs another output folder."
        )


def complete_set(plan: Plan, folders: WorkFolders, max_left_out: float = 0.05) -> SyntheticSet:
    """Write `labels.csv` and, last, the manifest; then delete what was needed on the way. One process does this.

    Raises:
        SynthesisError: If a shard has not been made, or too many images are left out.
    """
    records = [read_record(plan, number, folders.records) for number in range(plan.num_shards)]
    missing = [number for number, record in enumerate(records) if record is None]
    if missing:
        raise SynthesisError(f"{len(missing)} of {plan.num_shards} shards have not been made, such as {missing[0]}.")
    left_out = {index for record in records for index in record.left_out}
    check_left_out(plan, len(left_out), max_left_out)
    _write_labels(plan, left_out, folders.output / LABELS)
    preprocessing = Preprocessing(**{**plan.made_with["preprocessing"], "size": plan.made_with["image_size"]})
    shards = [record.shard for record in records]
    write_manifest(folders.output, preprocessing, shards, describe_synthesis(plan, records))
    shutil.rmtree(folders.work)
    return SyntheticSet.open(folders.output)


def describe_synthesis(plan: Plan, records: list[UnitRecord]) -> dict[str, Any]:
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


def _write_labels(plan: Plan, left_out: set[int], path: Path) -> None:
    """A row for each image that was made; labels of unlabelled sources are blank."""
    with atomic_write(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for planned in plan:
            if planned.index not in left_out:
                joined = (LABEL_SEPARATOR.join(names or ()) for names in (planned.labels, planned.sources))
                labels, sources = joined
                writer.writerow((planned.key, labels, plan.strategy, sources, planned.fraction))
        text.detach()
