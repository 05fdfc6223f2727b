"""Small shards for the tests of streaming."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np

from diffusers_dino.data import Preprocessing
from diffusers_dino.data.images.encoding import Encoding
from diffusers_dino.data.sharding.manifest import write_manifest as describe
from diffusers_dino.data.sharding.manifest import write_shard
from image_files import encoded


def encode(number: int, kind: str = "png", shape: tuple[int, ...] = (20, 24)) -> bytes:
    """An image file of noise, another for each number; `(H, W)` is grayscale and `(H, W, 3)` colour."""
    return encoded(np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8), kind)


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    """A tar of files, by name."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder: Path, shards: int = 3, samples: int = 8) -> list[Path]:
    """Shards `x-000000.tar` and so on, with an image and a JSON file for each sample."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(shards):
        members: dict[str, bytes] = {}
        for number in range(samples):
            key = f"set-{shard:02d}{number:04d}"
            members[f"{key}.png"] = encode(shard * samples + number)
            members[f"{key}.json"] = b'{"labels": ["%d"]}' % number
        paths.append(write_tar(folder / f"x-{shard:06d}.tar", members))
    return paths


def write_prepared(folder: Path, images: dict[str, np.ndarray], preprocessing: Preprocessing, **masks) -> Path:
    """A folder with a shard of prepared images, as `make_shards` leaves it, and masks `(size, size)` bool by key."""
    folder.mkdir(parents=True, exist_ok=True)
    png = Encoding(preprocessing, "png")
    files = {key: {"png": png.encode(preprocessing(image))} for key, image in images.items()}
    for key, mask in masks.items():
        files[key]["mask.png"] = png.encode(mask)
    describe(folder, preprocessing, [write_shard(folder / "train-000000.tar", "train", files.items())], {})
    return folder


def write_manifest(folder: Path, samples: int = 8, **splits: str) -> None:
    """The manifest of the shards in a folder, whose split is looked up by the last digit of their name."""
    shards = [
        {
            "name": path.name,
            "samples": samples,
            "bytes": path.stat().st_size,
            "split": splits.get(path.stem[-1:], "train"),
        }
        for path in sorted(folder.glob("*.tar"))
    ]
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "shards": shards}))
