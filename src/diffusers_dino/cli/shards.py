r"""Turn the folders of one or several data sets into webdataset shards, and say what is in them.

    diffusers-dino shards --output_dir shards --salt_file ~/cxr.salt --num_workers 8 \
        --source nih_chest_xray14=/data/nih --source padchest=/data/padchest --source /data/more_images

Each sample is `KEY.jpg` (prepared, uint8), `KEY.json` (labels and a few facts, no ids) and, where the source has
masks, `KEY.mask.png`. Killed at any moment, the same command goes on where it stopped and ends with the same bytes.
docs/shards.md describes what is written.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal

from ..data import Preprocessing
from ..data.images.encoding import Encoding
from ..data.sharding.duplicates import MAX_DISTANCE
from ..data.sharding.inputs import SALT_VARIABLE, open_sources, read_salt, write_key_map
from ..data.sharding.parts import (
    Item,
    Sample,
    Unreadable,
    assemble_shard,
    is_complete,
    list_items,
    read_part,
    write_part,
)
from ..data.sharding.plan import Plan, PlanRule, check_same, configuration_of, freeze, make_plan, read_plan, write_csv
from ..data.sharding.summary import describe_lineage, write_summary
from ..data.sharding.writing import MANIFEST, Shard, ShardError, read_manifest, verify_shards, write_manifest
from ..data.splits import SplitRule
from ..files import PARTIAL, lock_folder, make_writable_folder
from ..workers import run_parallel
from .arguments import flag
from .console import progress

UNREADABLE = "unreadable.csv"


@dataclass
class Arguments:
    output_dir: str = flag("shards", "Folder of the shards.")
    source: list[str] | None = flag(  # noqa: RUF009
        None,
        "NAME=FOLDER for a data set of the catalogue (docs/sources.md), FILE.yaml=FOLDER for one that the file "
        "describes, FOLDER for any images. May be repeated. Of duplicates the one named first stays.",
        action="extend",
    )
    size: int = flag(512, "Side of the images in pixels.", group="Preparation")
    remove_borders: bool = flag(True, "Cut uniform borders off.")
    border_tolerance: float = flag(0.01, "Largest deviation in a border, as a fraction of the dynamic range.")
    clip_percent: float = flag(0.0, "Percentage of pixels clipped at each end of the dynamic range.")
    resampling: Literal["box", "bilinear", "bicubic", "lanczos"] = flag("bicubic", "How images are resized.")
    format: Literal["jpg", "png"] = flag("jpg", "How images are stored; png loses nothing and takes more room.")
    quality: int = flag(95, "Quality of JPEG, up to 100.")
    salt_file: str | None = flag(
        None, f"File of the secret salt of all hashes, made if new. Else ${SALT_VARIABLE}.", group="Names"
    )
    write_key_map: str | None = flag(None, "CSV to write, outside of --output_dir: which file each key stands for.")
    test_fraction: float = flag(0.1, "Probability that a patient is kept for testing.", group="Splits")
    validation_fraction: float = flag(0.0, "Probability that a patient is kept for validation.")
    official_splits: bool = flag(False, "Keep the providers' splits; patients without one are drawn.")
    seed: int = flag(0, "Seed of the splits and of the order.")
    drop_duplicates: Literal["none", "exact", "perceptual"] = flag(
        "none", "Which copies of an image to leave out.", group="Duplicates and damage"
    )
    duplicate_distance: int = flag(MAX_DISTANCE, "Differing bits, of 256, up to which images are near duplicates.")
    max_unreadable: float = flag(0.05, "Largest tolerated fraction of images that cannot be read.")
    retry_unreadable: bool = flag(False, "On a restart, try again what could not be read.")
    shard_size: int = flag(1000, "Largest number of samples in a shard.", group="Work")
    num_workers: int = flag(os.cpu_count() or 1, "Processes that read, prepare and write; 0 works in this one.")
    part_size: int = flag(64, "Images that a worker prepares at a time: what a kill loses, for each worker.")
    work_dir: str | None = flag(None, "Where prepared images wait for the plan; by default in --output_dir.")
    verify: bool = flag(False, "Only compare the shards of --output_dir with their manifest.")


def main(args: Arguments) -> None:
    output = Path(args.output_dir)
    if args.verify:
        verify(output, args.num_workers)
        return
    encoding, rule = check_arguments(args)
    make_writable_folder(output)
    work = output / ".work" if args.work_dir is None else Path(args.work_dir) / f"{output.resolve().name}.work"
    make_writable_folder(work)
    with lock_folder(work):
        try:
            if (output / MANIFEST).is_file():
                lineage = read_manifest(output)["lineage"]
                check_same(lineage["configuration"], configuration_of(encoding, rule), output)
                verify(output, args.num_workers)
            else:
                make_shards(args, encoding, rule, output, work)
        finally:
            if (output / MANIFEST).is_file():  # complete: nothing is left to go on with
                shutil.rmtree(work)


def check_arguments(args: Arguments) -> tuple[Encoding, PlanRule]:
    """Check what can be checked before anything is read."""
    if not args.source:
        raise ValueError("Name the images: --source NAME=FOLDER for a known data set, or --source FOLDER.")
    for name, least in (("shard_size", 1), ("part_size", 1), ("num_workers", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}.")
    if not 0 <= args.max_unreadable <= 1:
        raise ValueError(f"--max_unreadable is a fraction in [0, 1], got {args.max_unreadable}.")
    if not 0 <= args.duplicate_distance <= MAX_DISTANCE:
        raise ValueError(f"--duplicate_distance must be in [0, {MAX_DISTANCE}], got {args.duplicate_distance}.")
    preparation = (args.size, args.remove_borders, args.border_tolerance, args.clip_percent, args.resampling)
    encoding = Encoding(Preprocessing(*preparation), args.format, args.quality)
    splits = SplitRule(args.validation_fraction, args.test_fraction, args.seed, args.official_splits)
    return encoding, PlanRule(splits, args.shard_size, args.drop_duplicates, args.duplicate_distance)


def make_shards(args: Arguments, encoding: Encoding, rule: PlanRule, output: Path, work: Path) -> None:
    """From the sources to a complete folder. What each step has done stays on disk."""
    parts, done = work / "parts", work / "shards"
    for folder in (output, work, parts, done):
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(f".*{PARTIAL}"):
            leftover.unlink()
    sources = open_sources(args.source)
    salt = read_salt(args.salt_file, output)
    items = [item for source in sources for item in list_items(source.records, salt)]
    print(f"{len(items)} images in {len(sources)} source(s)", flush=True)
    freeze(configuration_of(encoding, rule), items, args.part_size, work, output)
    if args.write_key_map:
        write_key_map(Path(args.write_key_map), items, output)
    samples, unreadable = prepare_all(args, encoding, items, salt, parts)
    write_csv(output / UNREADABLE, ["key", "source", "reason"], sorted(map(astuple, unreadable)))
    check_unreadable(args, unreadable, len(items), output)
    plan = read_plan(work)
    if plan is None:
        print("Looking for duplicates", flush=True)
        plan = make_plan(samples, rule, output, work)
    shards = write_shards(args, plan, samples, output, parts, done)
    lineage = describe_lineage([one.source for one in sources], plan, samples, unreadable)
    lineage["configuration"] = configuration_of(encoding, rule)
    write_summary(output / "summary.html", lineage, plan, samples, unreadable, parts)
    write_manifest(output, encoding.preprocessing, shards, lineage)
    print(f"{sum(s.samples for s in shards)} samples in {len(shards)} shards. See {output / 'summary.html'}")


def prepare_all(
    args: Arguments, encoding: Encoding, items: list[Item], salt: str, parts: Path
) -> tuple[list[Sample], list[Unreadable]]:
    """Read and prepare the images that are not yet, in parallel."""
    numbers = range(-(-len(items) // args.part_size))
    jobs = {n: items[n * args.part_size : (n + 1) * args.part_size] for n in numbers}
    left = [n for n in numbers if not is_complete(parts, n) or (args.retry_unreadable and read_part(parts, n)[1])]
    waiting = sum(len(jobs[n]) for n in left)
    started, damaged = time.perf_counter(), 0
    work = ((parts, number, jobs[number], encoding, salt) for number in left)
    with progress("Preparing", "image", len(items), len(items) - waiting) as bar:
        for prepared, refused in run_parallel(write_part, work, args.num_workers):
            bar.update(prepared)
            damaged += refused
            if damaged > args.max_unreadable * len(items):
                break  # the rest cannot mend that
    if waiting:
        rate = waiting / (time.perf_counter() - started)
        print(f"Prepared {waiting} images: {rate:.1f} images/s, {args.num_workers} worker(s)", flush=True)
    found = [read_part(parts, number) for number in numbers if is_complete(parts, number)]
    return [sample for samples, _ in found for sample in samples], [one for _, refused in found for one in refused]


def check_unreadable(args: Arguments, unreadable: Sequence[Unreadable], total: int, output: Path) -> None:
    if len(unreadable) <= args.max_unreadable * total and len(unreadable) < total:
        return
    reasons = [f"{count} x {reason!r}" for reason, count in Counter(one.reason for one in unreadable).most_common(5)]
    raise ShardError(
        f"At least {len(unreadable)} of {total} images cannot be read, more than the tolerated "
        f"{args.max_unreadable:.1%} (--max_unreadable): {', '.join(reasons)}. Their keys are in "
        f"{output / UNREADABLE}; --write_key_map says which files those are. Mend them and add --retry_unreadable."
    )


def write_shards(
    args: Arguments, plan: Plan, samples: Sequence[Sample], output: Path, parts: Path, done: Path
) -> list[Shard]:
    """Write the shards that are not there yet, in parallel; those that are, are compared with what was noted."""
    jobs = ((shard, [samples[number] for number in shard.samples], parts, output, done) for shard in plan.shards)
    shards = []
    with progress("Writing", "shard", len(plan.shards)) as bar:
        for shard in run_parallel(assemble_shard, jobs, args.num_workers):
            shards.append(shard)
            bar.update()
    order = {planned.name: number for number, planned in enumerate(plan.shards)}
    return sorted(shards, key=lambda shard: order[shard.name])


def verify(output: Path, num_workers: int) -> None:
    """Compare a folder with its manifest, and say what is wrong with it."""
    problems = verify_shards(output, num_workers)
    if problems:
        raise ShardError(
            f"{output} is damaged: {'; '.join(problems)}. Delete {MANIFEST} and run the command that made the folder "
            "to make it anew."
        )
    shards = read_manifest(output)["shards"]
    print(f"{output}: all {sum(s['samples'] for s in shards)} samples in {len(shards)} shards are as in {MANIFEST}")
