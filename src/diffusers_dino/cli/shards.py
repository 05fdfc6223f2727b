r"""Turn the folders of one or several data sets into webdataset shards, and say what is in them.

    diffusers-dino shards --output_dir shards --salt_file ~/cxr.salt --num_workers 8 \
        --source nih_chest_xray14=/data/nih --source padchest=/data/padchest --source /data/more_images

Each sample is `KEY.jpg` (prepared, uint8), `KEY.json` (labels and a few facts, no ids) and, where the source has
masks, `KEY.mask.png`. Killed at any moment, the same command goes on where it stopped and ends with the same bytes.
docs/shards.md describes what is written.
"""

from __future__ import annotations

import os
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..data import Preprocessing
from ..data.images.encoding import Encoding
from ..data.sharding import PlanRule, check_shards, make_shards
from ..data.sharding.duplicates import MAX_DISTANCE
from ..data.sharding.make import check_outside
from ..data.sharding.manifest import MANIFEST
from ..data.sources import OpenSource, open_source
from ..data.splits import SplitRule
from ..files import open_private
from .arguments import flag

SALT_VARIABLE = "DIFFUSERS_DINO_SALT"


@dataclass
class Arguments:
    output_dir: str = flag("shards", "Folder of the shards.")
    source: list[str] | None = flag(
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
    retry_unreadable: bool = flag(False, "On a restart of an unfinished run, try again what could not be read.")
    shard_size: int = flag(1000, "Largest number of samples in a shard.", group="Work")
    num_workers: int = flag(os.cpu_count() or 1, "Processes that read, prepare and write; 0 works in this one.")
    part_size: int = flag(64, "Images that a worker prepares at a time: what a kill loses, for each worker.")
    work_dir: str | None = flag(None, "Where prepared images wait for the plan; by default in --output_dir.")
    verify: bool = flag(False, "Only compare the shards of --output_dir with their manifest.")


def main(args: Arguments) -> None:
    output = Path(args.output_dir)
    complete = (output / MANIFEST).is_file()
    manifest = check_shards(output, args.num_workers) if args.verify else run(args)
    samples, shards = sum(shard["samples"] for shard in manifest["shards"]), len(manifest["shards"])
    if args.verify or complete:
        print(f"{output}: all {samples} samples in {shards} shards are as in {MANIFEST}")
    else:
        print(f"{samples} samples in {shards} shards. See {output / 'summary.html'}")


def run(args: Arguments) -> dict[str, Any]:
    if not args.source:
        raise ValueError("Name the images: --source NAME=FOLDER for a known data set, or --source FOLDER.")
    preparation = (args.size, args.remove_borders, args.border_tolerance, args.clip_percent, args.resampling)
    splits = SplitRule(args.validation_fraction, args.test_fraction, args.seed, args.official_splits)
    return make_shards(
        [open_named(text) for text in args.source],
        args.output_dir,
        read_salt(args.salt_file, args.output_dir),
        Encoding(Preprocessing(*preparation), args.format, args.quality),
        PlanRule(splits, args.shard_size, args.drop_duplicates, args.duplicate_distance),
        key_map=args.write_key_map,
        max_unreadable=args.max_unreadable,
        retry_unreadable=args.retry_unreadable,
        num_workers=args.num_workers,
        part_size=args.part_size,
        work_dir=args.work_dir,
        progress=True,
    )


def open_named(text: str) -> OpenSource | str:
    """`NAME=FOLDER` or `FILE.yaml=FOLDER` as a data set; else a folder."""
    name, equals, folder = text.partition("=")
    return open_source(name, folder) if equals else text


def read_salt(file: str | None, output_dir: str) -> str:
    """The secret that ids are hashed with, from a file (made if new) or the environment; it is never printed."""
    if file is None:
        salt = os.environ.get(SALT_VARIABLE, "").strip()
        if not salt:
            raise ValueError(
                "Ids of patients and images are hashed with a secret. Give --salt_file FILE, which is made if it "
                f"does not exist, or set the variable {SALT_VARIABLE}."
            )
        return salt
    path = Path(file).expanduser()
    check_outside(path, output_dir)
    if not path.exists():
        with open_private(path) as written:
            written.write(secrets.token_hex(16) + "\n")
        print(f"Made a new salt: {path}. Keep it, and keep it secret.", flush=True)
    elif os.name == "posix" and path.stat().st_mode & 0o077:
        print(f"Others may read the salt {path}: chmod 600 keeps it secret.", file=sys.stderr, flush=True)
    return path.read_text().strip()
