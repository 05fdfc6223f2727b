"""The search for copies: its time and memory, and what it finds among real images.

    python benchmarks/memorization.py --num_images 20000
    python benchmarks/memorization.py --images /data/cxr --patients /data/cxr.csv
    python benchmarks/memorization.py --images "examples/data/phantom-cxr/phantom-cxr-train-*.tar"

The first searches made-up images among as many, and prints seconds and the largest memory of the process. The others
calibrate a gate on half of the patients, and show it copies of their images and all images of the other half, once for
each seed of the halves.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.data.labels import read_label_table
from diffusers_dino.evaluation.memorization.planted import PLANTED
from diffusers_dino.metrics import open_extractor
from diffusers_dino.metrics.copy_gate import CopyGate, extract_views, search_copies, search_training
from resident import peak, start_peak


@dataclass
class Arguments:
    num_images: int = flag(20_000, "Made-up images to search, among as many.")
    images: str | None = flag(None, "Folder or tars of real images, to plant copies among.")
    patients: str | None = flag(None, "CSV table with their columns `file` and `patient`; else each image is its own.")
    size: int = flag(64, "Side in pixels that they are prepared at.")
    extractors: list[str] = flag(["local-contrast"], "Feature spaces.")
    false_alarms: float = flag(0.01, "Share of real images that the gate may refuse.")
    num_planted: int = flag(100, "Images that each change is made to, of each half.")
    num_seeds: int = flag(10, "Ways of halving the patients.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    if args.images:
        plant_copies(args)
    else:
        time_scan(args.num_images)


def time_scan(count: int) -> None:
    extractor, before, started = open_extractor("local-contrast"), start_peak(), time.perf_counter()
    training, images = (extract_views(extractor, made_up(count, seed)) for seed in range(2))
    extracted = time.perf_counter()
    found = search_copies(images, training)
    searched = time.perf_counter()
    print(
        f"{count} images against as many, {torch.get_num_threads()} threads: {extracted - started:.0f} s to extract, "
        f"{searched - extracted:.0f} s to search; at most {peak():.0f} MB, {before:.0f} of them before; mean distance "
        f"{found.smallest.mean():.4f}"
    )


def made_up(count: int, seed: int) -> torch.Tensor:
    """Smooth noise `(count, 1, 64, 64)`."""
    coarse = torch.rand(count, 1, 12, 12, generator=torch.Generator().manual_seed(seed))
    return torch.cat([F.interpolate(part, 64, mode="bicubic").clamp(0, 1) for part in coarse.split(1000)])


def plant_copies(args: Arguments) -> None:
    images = open_images(args.images, Preprocessing(args.size))
    pixels = torch.stack([images[i]["image"].mean(dim=0, keepdim=True) for i in range(len(images))])
    patients = np.arange(len(pixels))
    if args.patients:
        patients = np.array(read_label_table(args.patients, label_column="patient").select(images.keys).patients)
    for name in args.extractors:
        rows = [plant_once(args, name, pixels, patients, seed) for seed in range(args.num_seeds)]
        print(f"\n{name}: {len(rows)} halves of {len(set(patients))} patients, {len(pixels)} images")
        for change in rows[0]:
            shares = np.array([row[change] for row in rows])  # (seeds, 2)
            worst = shares.max(axis=0) if change == "false alarms" else shares.min(axis=0)
            both, features = (f"{mean:.2%} (worst {end:.2%})" for mean, end in zip(shares.mean(0), worst, strict=True))
            print(f"  {change}: {both}; by features only {features}", flush=True)


def plant_once(
    args: Arguments, name: str, pixels: torch.Tensor, patients: np.ndarray, seed: int
) -> dict[str, tuple[float, float]]:
    """Share of the other patients' images that is refused, and of each kind of planted copy; also without pictures."""
    extractor, random = open_extractor(name), np.random.default_rng(seed)
    order = random.permutation(np.unique(patients))
    trained = np.isin(patients, order[: len(order) // 2])
    training = extract_views(extractor, pixels[trained])
    real = search_training(training, patients[trained].tolist())
    gate = CopyGate.of(training, real, extractor, args.false_alarms)
    plain = CopyGate.of(training, real._replace(laid=None), extractor, args.false_alarms)

    def shares(candidates: torch.Tensor) -> tuple[float, float]:
        found = search_copies(extract_views(extractor, candidates), training).balanced(real)
        refused = found.smallest < gate.threshold, found.relative < plain.threshold
        return tuple(share.double().mean().item() for share in refused)

    chosen = pixels[trained][random.permutation(int(trained.sum()))[: args.num_planted]]
    return {"false alarms": shares(pixels[~trained]), **{name: shares(make(chosen)) for name, make in PLANTED.items()}}


if __name__ == "__main__":
    main()
