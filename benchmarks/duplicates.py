"""How far apart perceptual hashes are: of different radiographs, and of one radiograph that was saved again.

    python benchmarks/duplicates.py --images /data/cxr
    python benchmarks/duplicates.py --num_hashes 868000

The first prints the distances that docs/shards.md reports. The second times the search among random hashes, of which
one in a hundred has a near copy, and counts what it finds.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.data.sharding.duplicates import MAX_DISTANCE, near_pairs, perceptual_hash


@dataclass
class Arguments:
    images: str | None = flag(None, "Folder of radiographs.")
    size: int = flag(512, "Side of the prepared images in pixels.")
    every: int = flag(6, "Change every n-th image.")
    num_hashes: int = flag(0, "Search among so many made-up hashes instead.")


def saved(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=quality)
    return Image.open(buffer)


def cropped(image: Image.Image, fraction: float) -> Image.Image:
    margin = round(fraction * image.width)
    return image.crop((margin, margin, image.width - margin, image.height - margin))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG of quality 50": lambda image: saved(image, 50),
    "224 px": lambda image: image.resize((224, 224), Image.Resampling.BICUBIC),
    "224 px and JPEG of quality 75": lambda image: saved(image.resize((224, 224), Image.Resampling.BICUBIC), 75),
    "2 % clipped at each end": lambda image: ImageOps.autocontrast(image, 2),
    "contrast x 1.2": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    "gamma 1.3": lambda image: image.point([round(255 * (value / 255) ** 1.3) for value in range(256)]),
    "1 % cut off each side": lambda image: cropped(image, 0.01),
    "3 % cut off each side": lambda image: cropped(image, 0.03),
}


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    if args.num_hashes:
        time_search(args.num_hashes)
    elif args.images:
        measure_distances(args)
    else:
        sys.exit("Give --images or --num_hashes.")


def measure_distances(args: Arguments) -> None:
    data = open_images(args.images, Preprocessing(args.size))
    changed: dict[str, list[int]] = {name: [] for name in CHANGES}
    bits = []
    for number in range(len(data)):
        image = Image.fromarray((data[number]["image"][0] * 255).byte().numpy())
        bits.append(hash_bits(image))
        if number % args.every == 0:
            for name, change in CHANGES.items():
                changed[name].append(int((hash_bits(change(image)) != bits[-1]).sum()))
    signs = np.where(np.stack(bits), 1, -1).astype(np.float32)
    distance = (256 - signs @ signs.T)[np.triu_indices(len(signs), 1)] / 2
    low, middle = distance.min(), np.median(distance)
    print(f"{len(bits)} images, {len(distance)} pairs: least distance {low:.0f}, median {middle:.0f} of 256 bits")
    for name, values in changed.items():
        half, most = np.percentile(values, [50, 95])
        print(f"{name}: median {half:.0f}, 95 % {most:.0f}, most {max(values)} ({len(values)} images)")


def hash_bits(image: Image.Image) -> np.ndarray:
    return np.unpackbits(np.frombuffer(perceptual_hash(np.asarray(image.convert("L"))), np.uint8))


def time_search(count: int) -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (count, 32), dtype=np.uint8)
    copies = rng.choice(count, count // 100 * 2, replace=False).reshape(2, -1)
    bits = np.unpackbits(hashes[copies[0]], axis=1)
    for row in bits:
        row[rng.choice(256, rng.integers(0, MAX_DISTANCE + 1), replace=False)] ^= 1
    hashes[copies[1]] = np.packbits(bits, axis=1)
    started = time.perf_counter()
    pairs, _ = near_pairs(hashes, MAX_DISTANCE)
    seconds = time.perf_counter() - started
    planted = {tuple(pair) for pair in np.sort(copies.T, axis=1).tolist()}
    found = len(planted & {tuple(pair) for pair in pairs.tolist()})
    print(f"{count} hashes in {seconds:.0f} s: {found} of {len(planted)} planted pairs found, {len(pairs)} in all")


if __name__ == "__main__":
    main()
