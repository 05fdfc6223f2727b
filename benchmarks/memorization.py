"""The search for copies: its time and memory among random features, and what it finds among real images.

    python benchmarks/memorization.py --num_images 20000 --num_features 1024
    python benchmarks/memorization.py --images /data/cxr --patients /data/cxr.csv

The first searches N features among N others and prints seconds and the largest memory of the process. The second
trains on half of the patients and plants copies of their images among those of the other half, once for each seed of
the halves.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.data.labels import read_label_table
from diffusers_dino.evaluation.memorization.planted import PLANTED
from diffusers_dino.metrics import open_extractor
from diffusers_dino.metrics.copy_gate import extract_views, search_copies, search_training
from diffusers_dino.metrics.neighbours import calibrate_threshold, nearest_training

SLIGHT = ("exact", "mirrored", "slightly blurred (1 % of the side)")  # what must be found


@dataclass
class Arguments:
    num_images: int = flag(20_000, "Random features to search, among as many.")
    num_features: int = flag(1024, "Their width.")
    mirrored: bool = flag(False, "Search mirror images, too, as the protocol does.")
    images: str | None = flag(None, "Folder of real images, to plant copies among.")
    patients: str | None = flag(None, "CSV table with their columns `file` and `patient`.")
    size: int = flag(64, "Side in pixels that they are prepared at.")
    extractors: list[str] = flag(["local-contrast", "pixels"], "Feature spaces.")
    num_seeds: int = flag(10, "Ways of halving the patients.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    if args.images:
        plant_copies(args)
    else:
        time_scan(args)


def time_scan(args: Arguments) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (args.num_images, args.num_features)
    training = torch.randn(shape, generator=generator)
    queries = torch.randn((1 + args.mirrored, *shape), generator=generator)
    before = peak_mib()
    started = time.perf_counter()
    found = nearest_training(queries, training)
    seconds = time.perf_counter() - started
    print(
        f"{args.num_images} x {args.num_features} against as many, {len(queries)} views: {seconds:.1f} s on "
        f"{torch.get_num_threads()} threads, at most {peak_mib():.0f} MiB, {before:.0f} of them before the search; "
        f"mean distance {found.distance.mean():.4f}"
    )


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)


def plant_copies(args: Arguments) -> None:
    images = open_images(args.images, Preprocessing(args.size))
    pixels = torch.stack([images[i]["image"].mean(dim=0, keepdim=True) for i in range(len(images))])
    patients = np.array(read_label_table(args.patients, label_column="patient").select(images.keys).patients)
    for name in args.extractors:
        rows = [plant_once(name, pixels, patients, seed) for seed in range(args.num_seeds)]
        print(f"\n{name}: {len(rows)} halves of {len(set(patients))} patients")
        alarms = np.array([row.pop("false alarms") for row in rows])
        print(f"  false alarms: mean {alarms.mean():.2%}, most {alarms.max():.2%}")
        for change in rows[0]:
            found = np.array([row[change] for row in rows])
            print(f"  {change}: found {found.mean():.1%}, least {found.min():.1%}")


def plant_once(name: str, pixels: torch.Tensor, patients: np.ndarray, seed: int) -> dict[str, float]:
    """Share of each kind of planted copy that is found, and of the other patients' images that are called copies."""
    extractor = open_extractor(name)
    order = np.random.default_rng(seed).permutation(np.unique(patients))
    trained = np.isin(patients, order[: len(order) // 2])
    training = extract_views(extractor, pixels[trained])
    threshold = calibrate_threshold(search_training(training, patients[trained].tolist()).relative)

    def share(candidates: torch.Tensor) -> float:
        found = search_copies(extract_views(extractor, candidates), training).relative
        return (found < threshold).double().mean().item()

    others = pixels[~trained]
    # with the others they are 1,000 images
    count = (1000 - len(others)) // len(SLIGHT)
    chosen = pixels[trained][:count]
    return {"false alarms": share(others), **{change: share(tamper(chosen)) for change, tamper in PLANTED.items()}}


if __name__ == "__main__":
    main()
