"""How fast one worker loads 512 px JPEG shards, against a bare loop of Pillow; and whether its memory stays flat.

    python benchmarks/loader.py --output_json loader.json

Speed: the same bytes are decoded to arrays (and resized, for sizes other than 512) by Pillow in a loop, and by one
worker of `load_batches`, in turn in one run; the figure is the ratio of the median rates. `ratio_to_decoder` is that
to a loop which leaves the pixels inside Pillow. The first batches of a worker, while it starts, are not counted.

Transport: two workers of `load_batches` and of a plain `DataLoader` that stacks the same images, in turn.

Memory: one worker streams many small images of many shards; its resident set and what of it is its own are read from
the system as it goes.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import HfArgumentParser

from diffusers_dino.data import (
    GlobalBatchSampler,
    ImageDataset,
    Preprocessing,
    Slot,
    TrainingViews,
    load_batches,
    open_images,
)
from diffusers_dino.data.stores.archives import write_index


@dataclass
class Arguments:
    num_images: int = field(default=512, metadata={"help": "512 px images of the speed test."})
    sizes: list[int] = field(default_factory=lambda: [512, 256], metadata={"help": "Sizes to prepare them for."})
    batch_size: int = field(default=16, metadata={"help": "Images in a batch."})
    repeats: int = field(default=7, metadata={"help": "Timings of each arm."})
    num_samples: int = field(default=50_000, metadata={"help": "Samples streamed by the memory test; 0 skips it."})
    settled: int = field(default=5_000, metadata={"help": "Samples after which memory must not grow."})
    output_json: Path | None = field(default=None, metadata={"help": "Where the figures go besides the terminal."})


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"batch_size": args.batch_size, "pillow": Image.__version__, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        images = [radiograph_like(number, 512) for number in range(args.num_images)]
        write_shards(Path(folder), images, 128, size=512)
        figures["speed"] = {str(size): measure_speed(folder, images, size, args) for size in args.sizes}
        figures["transport"] = measure_transport(folder, args)
    if args.num_samples:
        figures["memory"] = measure_memory(args)
    print(json.dumps(figures, indent=1))
    if args.output_json:
        args.output_json.write_text(json.dumps(figures, indent=1) + "\n")


def radiograph_like(number: int, side: int) -> bytes:
    """A grayscale JPEG with large soft shapes, edges and grain, whose size is that of a radiograph's."""
    generator = np.random.default_rng(number)
    y, x = np.mgrid[0:side, 0:side] / side
    image = np.zeros((side, side))
    for _ in range(24):
        (cx, cy), (rx, ry), level = generator.uniform(0, 1, 2), generator.uniform(0.02, 0.4, 2), generator.normal()
        image += level / (1 + np.exp(np.clip(40 * (((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 - 1), -50, 50)))
    image = (image - image.min()) / np.ptp(image) + generator.normal(0, 0.015, image.shape)
    buffer = io.BytesIO()
    Image.fromarray((255 * image.clip(0, 1)).round().astype(np.uint8)).save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


def write_shards(folder: Path, images: list[bytes], per_shard: int, size: int) -> None:
    """Shards, indexes and the manifest that `make_shards` would write for prepared images."""
    shards = []
    for first in range(0, len(images), per_shard):
        path = folder / f"bench-{first // per_shard:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for number, content in enumerate(images[first : first + per_shard], first):
                for name, data in ((f"bench-{number:06d}.jpg", content), (f"bench-{number:06d}.json", b"{}")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        write_index(path)
        shards.append({"name": path.name, "samples": len(images[first : first + per_shard]), "split": "train"})
    manifest = {"format": 1, "preprocessing": asdict(Preprocessing(size)), "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def measure_speed(folder: str, images: list[bytes], size: int, args: Arguments) -> dict[str, Any]:
    dataset = open_images(folder, Preprocessing(size))
    views = TrainingViews(dataset, None)

    def decode(content: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(content))
        if image.size[0] != size:
            return image.resize((size, size), Image.Resampling.BICUBIC)
        image.load()
        return image

    def bare() -> float:
        return sum(np.asarray(decode(content)) is not None for content in images)

    def decoder() -> float:
        return sum(decode(content) is not None for content in images)

    def rate(action: Callable[[], float]) -> float:
        start = time.perf_counter()
        return action() / (time.perf_counter() - start)

    batches = load_batches(views, GlobalBatchSampler(len(dataset), args.batch_size), num_workers=1)

    def loader() -> float:
        return sum(len(next(batches)["key"]) for _ in range(len(images) // args.batch_size))

    rates: dict[str, list[float]] = {"bare": [], "decoder": [], "loader": []}
    loader()  # the worker starts, files come into the page cache
    for _ in range(args.repeats):
        rates["bare"].append(rate(bare))
        rates["decoder"].append(rate(decoder))
        for _ in range(4):  # batches that the worker prepared during the other arms
            next(batches)
        rates["loader"].append(rate(loader))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "ratio": round(medians["loader"] / medians["bare"], 3),
        "ratio_to_decoder": round(medians["loader"] / medians["decoder"], 3),
        "images_per_s": {name: [round(value) for value in values] for name, values in rates.items()},
        "kib_per_image": len(images[0]) // 1024,
    }


class PlainBatches(Dataset[dict[str, Any]]):
    """Batches as a plain `DataLoader` moves them: each in new memory, which travels through `/dev/shm`."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __getitems__(self, slots: Sequence[Slot]) -> dict[str, Any]:
        keys, arrays = zip(*self.images.read_many([slot.index for slot in slots]), strict=True)
        return {"key": list(keys), "image": torch.from_numpy(np.stack(arrays)[:, None])}


def measure_transport(folder: str, args: Arguments) -> dict[str, Any]:
    """Two workers at 512 px: `load_batches` against a plain `DataLoader`, which pins its memory if there is a GPU.

    The two take turns in random order, so that other work on the machine disturbs both. Ratios are those of each
    turn; the time on a core of all processes and threads is less noisy than the rate. Figures are the quartiles.
    """
    dataset = open_images(folder, Preprocessing(512))
    sampler = GlobalBatchSampler(len(dataset), args.batch_size)
    options = {"collate_fn": as_it_is, "num_workers": 2, "pin_memory": torch.cuda.is_available()}
    plain = DataLoader(PlainBatches(dataset), batch_sampler=sampler, generator=torch.Generator(), **options)
    arms = {
        "ours": lambda: load_batches(TrainingViews(dataset, None), sampler, num_workers=2),
        "plain": lambda: ({**batch, "image": batch["image"] / 255} for batch in plain),
    }
    started: dict[str, tuple[Iterator[Any], list[int]]] = {}
    for name, start in arms.items():
        before = set(multiprocessing.active_children())
        batches = start()
        next(batches)
        workers = set(multiprocessing.active_children()) - before
        started[name] = batches, [os.getpid(), *(worker.pid for worker in workers)]
    rates: dict[str, list[float]] = {name: [] for name in arms}
    costs: dict[str, list[float]] = {name: [] for name in arms}
    count = args.num_images // args.batch_size
    order = np.random.default_rng(0)
    for _ in range(args.repeats):
        for name in order.permutation(list(arms)):
            batches, processes = started[name]
            for _ in range(6):  # those that were prepared during the other arm
                next(batches)
            clock, busy = time.perf_counter(), core_seconds(processes)
            for _ in range(count):
                next(batches)
            rates[name].append(count * args.batch_size / (time.perf_counter() - clock))
            costs[name].append(1000 * (core_seconds(processes) - busy) / count / args.batch_size)
    return {
        "plain_over_ours": quartiles(np.divide(rates["plain"], rates["ours"])),
        "plain_over_ours_by_core_time": quartiles(np.divide(costs["ours"], costs["plain"])),
        "images_per_s": {name: quartiles(values) for name, values in rates.items()},
        "core_ms_per_image": {name: quartiles(values) for name, values in costs.items()},
    }


def as_it_is(batch: Any) -> Any:
    return batch


def quartiles(values: Any) -> list[float]:
    return np.percentile(values, [25, 50, 75]).round(3).tolist()


def core_seconds(processes: list[int]) -> float:
    """Time on a core of all threads of processes, from /proc."""
    threads = [thread for process in processes for thread in Path(f"/proc/{process}/task").iterdir()]
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def measure_memory(args: Arguments) -> dict[str, Any]:
    """Resident and own memory of a worker after `settled` and after all samples, in MiB, and the growth."""
    with tempfile.TemporaryDirectory() as folder:
        small = [radiograph_like(number, 64) for number in range(64)]
        write_shards(Path(folder), [small[number % 64] for number in range(args.num_samples)], 1000, size=64)
        dataset = open_images(folder, Preprocessing(64))
        order = dataset.order(8)
        sampler = GlobalBatchSampler(len(dataset), 50, order=order)
        batches = load_batches(TrainingViews(dataset, None), sampler, num_workers=1)
        seen, history = 0, {}
        while seen < args.num_samples:
            seen += len(next(batches)["key"])
            if seen % args.settled == 0:
                (worker,) = multiprocessing.active_children()
                history[seen] = memory_of(worker.pid)
    first, last = history[args.settled], history[max(history)]
    growth = {name: round(last[name] / first[name] - 1, 4) for name in first}
    return {"samples": args.num_samples, "shards": len(order.sizes), "growth": growth, "mib": history}


def memory_of(pid: int) -> dict[str, float]:
    """RSS and USS of a process in MiB, from /proc."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {"rss": kib["Rss"] / 1024, "uss": (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024}


if __name__ == "__main__":
    main()
