"""From labelled radiographs to images drawn by label: every stage of it trained, and the figures that it reaches.

    python benchmarks/prior_from_scratch.py --images /data/cxr --labels /data/cxr.csv --encoder facebook/dinov2-small

Autoencoder, UNet and prior start from random weights; the encoder is a pretrained one. Patients are held out of all of
them, and `benchmarks/prior.py` then measures on the held-out images.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_dino import DinoImageConditioner
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.data.labels import LabelTable, read_label_table
from diffusers_dino.files import make_writable_folder, write_json
from diffusers_dino.training.features import evenly_spread

BENCHMARKS = Path(__file__).resolve().parent
EXAMPLES = BENCHMARKS.parent / "examples"
SCRATCH = str(EXAMPLES / "configs" / "from_scratch")


@dataclass
class Arguments:
    images: str = flag("/data/cxr", "Folder of images.")
    labels: str = flag("/data/cxr.csv", "CSV with file, patient and findings.")
    encoder: str = flag("facebook/dinov2-small", "Pretrained encoder.")
    encoder_size: int = flag(112, "Pixels that it sees.")
    size: int = flag(64, "Side of the images in pixels.")
    num_training: int = flag(3000, "Images to train on.")
    num_held_out: int = flag(500, "Images of other patients, to measure on.")
    vae_steps: int = flag(430, "Updates of the autoencoder.")
    unet_steps: int = flag(1500, "Updates of the UNet.")
    prior_steps: int = flag(1500, "Updates of the prior, unless it stops early.")
    num_sets: int = flag(4, "Sets of draws, for figures of tokens.")
    num_image_sets: int = flag(2, "Of those, sets that images are made of.")
    seed: int = flag(0, "Seed of everything.")
    output_dir: str = flag("outputs/prior-from-scratch", "Where everything goes.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    folder = make_writable_folder(args.output_dir)
    images = open_images(args.images, Preprocessing(args.size, remove_borders=False))
    keys = choose(args, read_label_table(args.labels).select(images.keys))
    for name, own in keys.items():
        (folder / f"{name}.txt").write_text("".join(f"{key}\n" for key in own))
    conditioner = DinoImageConditioner.from_encoder(args.encoder, size=args.encoder_size)
    conditioner.fit_normalization(evenly_spread(images.select(keys["training"]), 256))
    conditioner.save_pretrained(folder / "conditioner")
    unet = json.loads((EXAMPLES / "configs" / "tiny_unet.json").read_text())
    write_json(folder / "unet.json", {**unet, "cross_attention_dim": conditioner.token_dim})

    views = {
        "train_data_dir": args.images,
        "keys_file": folder / "training.txt",
        "resolution": args.size,
        "remove_borders": False,
        "augment": False,
        "seed": args.seed,
    }
    features = {"conditioner": folder / "conditioner", "feature_cache": folder / "features"}
    latents = {**views, **features, "vae": folder / "vae", "cache_views": 1}
    run("train_vae.py", f"{SCRATCH}_vae.yaml", **views, max_train_steps=args.vae_steps, output_dir=folder / "vae")
    run("cache", **latents)
    new = {"unet_config": folder / "unet.json", "max_train_steps": args.unet_steps, "output_dir": folder / "model"}
    run("train_dino.py", f"{SCRATCH}_unet.yaml", **latents, **new)
    known = {"labels": args.labels, "patient_column": "patient", "width": 192, "max_train_steps": args.prior_steps}
    run("train_prior.py", **views, **features, **known, output_dir=folder / "prior")
    measure(args, folder)


def choose(args: Arguments, table: LabelTable) -> dict[str, list[str]]:
    """Images to train on, and images of other patients to measure on."""
    generator = np.random.default_rng(args.seed)
    patients = np.array(table.patients)
    order = np.concatenate([np.flatnonzero(patients == name) for name in generator.permutation(np.unique(patients))])
    first = np.flatnonzero(patients[order[1:]] != patients[order[:-1]]) + 1  # where another patient begins
    border = int(first[np.searchsorted(first, args.num_held_out)])
    chosen = {"held_out": order[:border], "training": generator.permutation(order[border:])[: args.num_training]}
    return {name: sorted(table.keys[row] for row in rows) for name, rows in chosen.items()}


def run(program: str, *words: str, **flags: Any) -> None:
    """A script of examples/, a benchmark, or a command, as a user starts it; says how long it took."""
    places = [place for place in (EXAMPLES / program, BENCHMARKS / program) if place.is_file()]
    start = [str(places[0])] if places else ["-m", "diffusers_dino", program]
    given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    started = time.perf_counter()
    subprocess.run([sys.executable, *start, *words, *given], check=True)
    print(f"{program}: {time.perf_counter() - started:.0f} s", flush=True)


def measure(args: Arguments, folder: Path) -> None:
    """Figures on the held-out images."""
    run(
        "prior.py",
        model=folder / "model",
        prior=folder / "prior",
        training=args.images,
        training_keys=folder / "training.txt",
        feature_cache=folder / "features",
        held_out=args.images,
        held_out_keys=folder / "held_out.txt",
        labels=args.labels,
        size=args.size,
        num_sets=args.num_sets,
        num_image_sets=args.num_image_sets,
        parts="tokens images",
        seed=args.seed,
        output_dir=folder / "figures",
    )


if __name__ == "__main__":
    main()
