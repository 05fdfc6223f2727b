"""Whether `familiarity` tells images like the training images from others, as AUROC with N of each.

    python benchmarks/familiarity.py --training "phantom-cxr-train-*.tar" --like "phantom-cxr-test-*.tar" --others mri
    python benchmarks/familiarity.py --encoder dinov2 --training cxr64 --like nih nih@64 --others mri slides

Names are folders or tars of images, followed by `@SIZE` where they are first brought to a side of SIZE pixels. Noise
of four kinds and blank images are added to the others. Twins of training images, of whatever size, are taken out of
those that are like them, by difference hashes of 256 bits of which at most 12 differ.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bundled import DATA
from diffusers_dino import DinoImageConditioner
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.familiarity import UNLIKE
from diffusers_dino.metrics.auroc import label_auroc

TWIN = 12  # differing bits of 256: real pairs of other patients differ in many more


@dataclass
class Arguments:
    encoder: str | None = flag(None, "Encoder's folder or Hub id; by default the bundled conditioner.")
    training: str = flag("", "Images that the statistics are of.")
    like: list[str] = flag([], "Other images of their kind.")
    others: list[str] = flag([], "Images of other kinds.")
    num_training: int = flag(1000, "How many of them are used.")
    num_images: int = flag(200, "How many of each other set.")
    seed: int = flag(0, "Of the noise.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    torch.manual_seed(args.seed)
    conditioner = (
        DinoImageConditioner.from_encoder(args.encoder)
        if args.encoder
        else DinoImageConditioner.from_pretrained(DATA / "tiny-diffusion/conditioner")
    )
    start, training = time.monotonic(), read(args.training, args.num_training)
    conditioner.fit_familiarity(encoded(conditioner, training))
    kept = conditioner.token_statistics
    print(
        f"{args.training}: {len(training)} images, {len(kept.directions)} directions of {kept.directions.shape[1]}, "
        f"{time.monotonic() - start:.0f} s"
    )
    known = torch.stack([difference_hash(image) for image in training])
    like = {name: [image for image in read(name, args.num_images) if not is_twin(image, known)] for name in args.like}
    others = {name: read(name, args.num_images) for name in args.others}
    others |= {"noise": list(noise(args.num_images, args.seed)), "blank": list(blank())}
    scores = {
        name: torch.cat([conditioner.familiarity_of(batch) for batch in encoded(conditioner, images)])
        for name, images in (like | others).items()
    }
    for name, found in scores.items():
        print(f"{name}: N {len(found)}, below {UNLIKE}: {(found < UNLIKE).double().mean().item():.3f}")
    for one in like:
        for other in others:
            both = torch.cat([scores[one], scores[other]])
            is_like = torch.arange(len(both)) < len(scores[one])
            (value,) = label_auroc(both[:, None].numpy(), is_like[:, None].numpy())
            print(f"{one} ({len(scores[one])}) against {other} ({len(scores[other])}): AUROC {value:.4f}")


def read(name: str, count: int) -> list[Image.Image]:
    """About `count` images of a set, evenly spread, at their own size or at that after the @."""
    source, _, size = name.partition("@")
    images = open_images(source, Preprocessing(int(size or 224)), local_files_only=True)
    places = range(0, len(images), max(1, len(images) // count))[:count]
    return [Image.fromarray(array) for _, array in images.read_many(list(places), replace=False) if array is not None]


def encoded(conditioner: DinoImageConditioner, images: list[Image.Image]) -> Iterator[Tensor]:
    """Their tokens, batch by batch."""
    for first in range(0, len(images), 32):
        yield conditioner.encode(images[first : first + 32])


def noise(count: int, seed: int, size: int = 224) -> Iterator[Image.Image]:
    """Uniform, normal, coarse and sparse noise in turn."""
    draw = np.random.default_rng(seed)
    for number in range(count):
        coarse = draw.integers(0, 256, (draw.integers(2, 32),) * 2).astype(np.uint8)
        kinds = (
            lambda: draw.integers(0, 256, (size, size)),
            lambda: draw.normal(128, draw.uniform(5, 60), (size, size)).clip(0, 255),
            lambda coarse=coarse: np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)),
            lambda: (draw.random((size, size)) < draw.uniform(0.05, 0.5)) * 255,
        )
        yield Image.fromarray(np.asarray(kinds[number % 4]()).astype(np.uint8))


def blank(size: int = 224) -> Iterator[Image.Image]:
    """Images of one gray level each."""
    return (Image.fromarray(np.full((size, size), level, np.uint8)) for level in range(0, 256, 4))


def difference_hash(image: Image.Image) -> Tensor:
    """`(256,)` bool: where brightness falls from left to right, at 16 x 17 pixels."""
    small = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.LANCZOS), np.int16)
    return torch.from_numpy(np.diff(small, axis=1) < 0).flatten()


def is_twin(image: Image.Image, known: Tensor) -> bool:
    """Whether an image is nearly one of those with these hashes `(N, 256)`."""
    return bool(((known ^ difference_hash(image)).sum(1) <= TWIN).any())


if __name__ == "__main__":
    main()
