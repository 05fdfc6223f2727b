"""From data sets to a complete folder of shards. What each step has done stays on disk: a restart goes on there."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import astuple
from pathlib import Path
from typing import Any

from ...files import (
    csv_text,
    lock_folder,
    make_writable_folder,
    open_private,
    refuse_other_folder,
    remove_partials,
    write_csv,
)
from ...frozen import freeze, require_same
from ...workers import progress_bar, run_parallel
from ..images.encoding import Encoding
from ..sources import OpenSource, Record, Source
from ..stores.folder import FolderStore
from ..stores.walk import WORK, list_files
from .manifest import MANIFEST, Shard, ShardError, check_shards, read_manifest, write_manifest
from .parts import (
    FOLDER,
    Item,
    Sample,
    Unreadable,
    assemble_shard,
    file_mark,
    has_changed,
    is_complete,
    list_items,
    read_part,
    write_part,
)
from .plan import (
    PLAN,
    PlanRule,
    ShardPlan,
    configuration_of,
    files_of,
    images_of,
    make_plan,
    read_plan,
    warn_of_splits,
)
from .provenance import describe_lineage, lineage_of
from .summary import write_summary

__all__ = ["check_outside", "make_shards"]

_UNREADABLE = "unreadable.csv"


def make_shards(
    sources: Sequence[OpenSource | str | Path],
    output_dir: str | Path,
    salt: str,
    encoding: Encoding | None = None,
    rule: PlanRule | None = None,
    *,
    key_map: str | Path | None = None,
    max_unreadable: float = 0.05,
    retry_unreadable: bool = False,
    num_workers: int = 0,
    part_size: int = 64,
    work_dir: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Turn one or several data sets into webdataset shards of prepared images, as docs/shards.md describes.

    A run that is stopped at any moment goes on where it stopped when it is called again, and ends with the same
    bytes, whatever the number of workers. A complete folder is compared with its manifest, which is returned.

    Args:
        sources: Data sets (`open_source`) and folders, of which all images are taken; in a folder `KEY.mask.png` is
            the mask of the image `KEY`, and each image is its own patient. Of copies the first one stays.
        output_dir: Where the shards go.
        salt: Secret of at least 16 bytes. Ids of images and patients are stored only as hashes with it.
        encoding: How images are prepared and stored; by default `Encoding()`: JPEG of quality 95, 512 px.
        rule: How they are assigned to splits and shards; by default `PlanRule()`.
        key_map: CSV to write, outside of `output_dir`: which file each key stands for.
        max_unreadable: Largest tolerated fraction of images that cannot be read, in [0, 1].
        retry_unreadable: Whether a restart of an unfinished run tries again what could not be read.
        num_workers: Processes that read, prepare and write; 0 works in this one.
        part_size: Images that a worker prepares at a time: what a kill loses, for each worker.
        work_dir: Where prepared images wait for the plan; by default in `output_dir`.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If an argument is out of range, two sources have one name or two images of a source one id.
        FileNotFoundError: If a folder is not there or holds no image.
        ShardError: If the folder was begun with other settings or images, is damaged, or too much is unreadable.
        RuntimeError: If another run is at work in the folder.
    """
    encoding, rule = encoding or Encoding(), rule or PlanRule()
    for name, value, least in (("part_size", part_size, 1), ("num_workers", num_workers, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= max_unreadable <= 1:
        raise ValueError(f"max_unreadable is a fraction in [0, 1], got {max_unreadable}")
    if key_map is not None:
        check_outside(key_map, output_dir)
    output = make_writable_folder(output_dir)
    refuse_other_folder(output, ShardError)
    inside = make_writable_folder(output / WORK)
    work = inside if work_dir is None else make_writable_folder(Path(work_dir) / f"{output.resolve().name}{WORK}")
    configuration = configuration_of(encoding, rule)
    with lock_folder(inside), nullcontext() if work == inside else lock_folder(work):
        finished = (output / MANIFEST).is_file()
        try:
            opened = _open(sources, salt)
            items = [item for _, records in opened for item in list_items(records, salt)]
            if finished:
                _require_same_as_finished(output, configuration, items)
                _write_key_map(key_map, items)
                return check_shards(output, num_workers)
            parts, done = work / "parts", work / "shards"
            for folder in (output, work, parts, done):
                folder.mkdir(exist_ok=True)
                remove_partials(folder)
            begun = configuration | {"part_size": part_size} | images_of(items)
            freeze(work / "configuration.json", begun, ShardError, output)
            _write_key_map(key_map, items)
            if retry_unreadable:
                _forget_plan(output, work, done)
            groups = [items[start : start + part_size] for start in range(0, len(items), part_size)]
            jobs = [(parts, number, group, encoding, salt) for number, group in enumerate(groups)]
            samples, unreadable = _prepare(jobs, max_unreadable, retry_unreadable, num_workers, progress)
            write_csv(output / _UNREADABLE, ["key", "source", "reason"], sorted(astuple(u)[:3] for u in unreadable))
            _check_unreadable(unreadable, len(items), max_unreadable, output)
            with progress_bar("Looking for duplicates", "image", len(samples), show=progress) as bar:
                plan = read_plan(samples, work) or make_plan(samples, rule, output, work)
                bar.update(len(samples))
            warn_of_splits(samples, plan, rule)
            shards = _assemble(plan, samples, parts, output, done, num_workers, progress)
            lineage = describe_lineage([source for source, _ in opened], plan, samples, unreadable)
            lineage["configuration"] = configuration
            mark_of = {one.key: one.mark for one in (*samples, *unreadable)}
            marks = [mark_of[item.key] or file_mark(item.record) for item in items]
            lineage["images"] = images_of(items) | files_of(items, marks)
            write_summary(output / "summary.html", lineage, plan, samples, unreadable, parts)
            write_manifest(output, encoding.preprocessing, shards, lineage)
            return read_manifest(output)
        finally:
            if (output / MANIFEST).is_file():  # complete: nothing is left to go on with
                begun_by_another = finished and work != inside and (work / "configuration.json").is_file()
                for folder in {inside} if begun_by_another else {inside, work}:
                    shutil.rmtree(folder)


def _require_same_as_finished(output: Path, configuration: dict[str, Any], items: Sequence[Item]) -> None:
    """Refuse other settings, images, labels or files than a complete folder was made from, with ShardError."""
    lineage = lineage_of(output)
    with ThreadPoolExecutor(16) as pool:  # most of the time a network drive is waited for
        now = images_of(items) | files_of(items, pool.map(file_mark, [item.record for item in items]))
    begun = lineage.get("images")
    if begun is None:  # a folder of an older version
        begun = {f"images of {source['name']}": source["images"] for source in lineage.get("sources", [])}
        now = {f"images of {name}": count for name, count in Counter(i.record.source for i in items).items()}
    require_same(lineage.get("configuration", {}) | begun, configuration | now, output, ShardError)


def _forget_plan(output: Path, work: Path, done: Path) -> None:
    """Remove a plan and its shards: with images that can be read now, its numbers of samples are wrong."""
    if (work / PLAN).is_file():
        for path in (*done.iterdir(), *output.glob("*.tar*"), work / PLAN):  # the plan last, in case of a kill
            path.unlink()


def check_outside(path: str | Path, folder: str | Path) -> None:
    """Refuse a secret file in a folder that will be passed on, with ValueError."""
    if Path(path).resolve().is_relative_to(Path(folder).resolve()):
        raise ValueError(f"{path} would be passed on with the shards in {folder}. Put it elsewhere.")


def _open(sources: Sequence[OpenSource | str | Path], salt: str) -> list[tuple[Source, Iterable[Record]]]:
    """The description and the records of each source; folders are named `images`, `images2`, ..."""
    opened: list[tuple[Source, Iterable[Record]]] = []
    folders = 0
    for source in sources:
        if isinstance(source, OpenSource):
            opened.append((source.source, source.records(salt)))
        else:
            folders += 1
            described = Source(f"{FOLDER}{folders if folders > 1 else ''}", image="**/*", title="A folder of images")
            opened.append((described, _folder_records(described.name, Path(source))))
    names = Counter(source.name for source, _ in opened)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"The source {', '.join(repeated)} is given twice. A source has one folder.")
    if not opened:
        raise ValueError("Give at least one source of images.")
    return opened


def _folder_records(name: str, root: Path) -> Iterator[Record]:
    """All images in a folder and its subfolders, as training takes them. Each is its own patient."""
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {str(root)!r} of images.")
    listing = list_files(root)
    packed = sum(path.endswith((".tar", ".parquet")) for path in listing.files)
    images = FolderStore(root, show_names=False, listing=listing)
    if packed:
        raise ValueError(
            f"{str(root)!r} holds {packed} tar or Parquet files beside {len(images.paths)} images: which are meant? "
            "Give the folder below it that holds only images."
        )
    for number, path in enumerate(images.paths):
        mask = images.companion_path(number, "mask.png")
        yield Record(name, root / path, path, path, masks=(mask,) if mask else ())


def _write_key_map(path: str | Path | None, items: Iterable[Item]) -> None:
    if path is None:
        return
    of_items = ((item.key, item.record) for item in items)
    rows = [[key, r.source, r.image_id, r.patient, str(r.image)] for key, r in of_items]
    with open_private(Path(path)) as file:
        file.write(csv_text(["key", "source", "image_id", "patient", "file"], rows))


def _prepare(
    jobs: Sequence[tuple[Path, int, list[Item], Encoding, str]],
    max_unreadable: float,
    retry_unreadable: bool,
    num_workers: int,
    progress: bool,
) -> tuple[list[Sample], list[Unreadable]]:
    """Write the parts that are not there yet, in parallel, and read all; stop when too many images are unreadable."""
    left = [job for job in jobs if not is_complete(*job[:2]) or (retry_unreadable and read_part(*job[:2])[1])]
    total, waiting = (sum(len(items) for _, _, items, _, _ in some) for some in (jobs, left))
    damaged = 0
    with progress_bar("Preparing", "image", total, total - waiting, progress) as bar:
        for prepared, refused in run_parallel(write_part, left, num_workers):
            bar.update(prepared)
            damaged += refused
            if damaged > max_unreadable * total:
                break
    found = [read_part(*job[:2]) for job in jobs if is_complete(*job[:2])]
    samples = [sample for of_part, _ in found for sample in of_part]
    record_of = {item.key: item.record for _, _, items, _, _ in jobs for item in items}
    changed = [sample for sample in samples if has_changed(sample, record_of[sample.key])]
    if changed:
        raise ShardError(
            f"{len(changed)} images have changed since they were prepared, such as that of key {changed[0].key}. "
            "Give another output folder."
        )
    return samples, [one for _, refused in found for one in refused]


def _check_unreadable(unreadable: Sequence[Unreadable], total: int, max_unreadable: float, output: Path) -> None:
    damaged = [one for one in unreadable if not one.no_image]
    if len(damaged) <= max_unreadable * total and len(unreadable) < total:
        return
    damaged = damaged or list(unreadable)
    reasons = [f"{count} x {reason!r}" for reason, count in Counter(one.reason for one in damaged).most_common(5)]
    raise ShardError(
        f"At least {len(damaged)} of {total} images cannot be read, more than the tolerated {max_unreadable:.1%} "
        f"(max_unreadable): {', '.join(reasons)}. Their keys are in {output / _UNREADABLE}; a key map says which "
        "files those are. Repair them and go on with retry_unreadable."
    )


def _assemble(
    plan: ShardPlan,
    samples: Sequence[Sample],
    parts: Path,
    output: Path,
    done: Path,
    num_workers: int,
    progress: bool,
) -> list[Shard]:
    """Write, in parallel, the shards that are not there yet; those that are, are compared with their records."""
    if strangers := sorted({path.name for path in output.glob("*.tar")} - {shard.name for shard in plan.shards}):
        raise ShardError(
            f"{output} holds {len(strangers)} shards of another run, such as {strangers[0]}. Delete them, or give "
            "another output folder."
        )
    jobs = (
        (shard.name, shard.split, [samples[number] for number in shard.samples], parts, output, done)
        for shard in plan.shards
    )
    written = {}
    with progress_bar("Writing", "shard", len(plan.shards), show=progress) as bar:
        for shard in run_parallel(assemble_shard, jobs, num_workers):
            written[shard.name] = shard
            bar.update()
    return [written[planned.name] for planned in plan.shards]
