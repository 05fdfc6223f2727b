"""What runs of `make_shards` read and leave: pictures, and the contents of the folder that it wrote."""

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SALT = "0123456789abcdef0123"


def picture(seed: int, side: int = 48) -> np.ndarray:
    """Smooth blobs `(side, side)` uint8, unlike those of other seeds."""
    coarse = np.random.default_rng(seed).integers(0, 256, (24, 24), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def facts(folder: Path) -> dict[str, dict]:
    """The JSON of each sample, by key."""
    found = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            for info in tar:
                if info.name.endswith(".json"):
                    found[info.name.removesuffix(".json")] = json.load(tar.extractfile(info))
    return found


def keys_of(path: Path) -> dict[str, str]:
    """Image id -> key."""
    with open(path, newline="") as file:
        return {row["image_id"]: row["key"] for row in csv.DictReader(file)}


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
