r"""Compute features of a collection of images once, for all figures that are taken of them.

    diffusers-dino extract --data /data/cxr --output features.safetensors \
        --extractor xrv --weights xrv.safetensors

The file holds the features, the keys of their images and what the features are; it is refused beside features of
another extractor. docs/metrics.md lists the extractors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..data import Preprocessing, open_images
from ..data.keys import read_keys
from ..devices import device_of
from ..metrics import extract_features, open_extractor
from .arguments import flag
from .console import hold_output


@dataclass
class Arguments:
    data: str | None = flag(None, "Folder or URL of images, tars, or `datasets` folder.")
    output: str = flag("features.safetensors", "File to write.")
    extractor: str = flag(
        "pixels", "pixels, tiny, xrv, rad-dino, dinov2, inception, timm/NAME, or a folder.", group="Extractor"
    )
    weights: str | None = flag(None, "File or folder of its weights.")
    sha256: str | None = flag(None, "What their SHA-256 must be.")
    device: str | None = flag(None, "Where to compute; a GPU if there is one.")
    batch_size: int = flag(64, "Images computed at once.")
    split: str = flag("train", "Split of a `datasets` set, or of a folder of shards with a manifest.", group="Images")
    keys_file: str | None = flag(None, "Text file of sample keys, one a line: take only these.")
    resolution: int = flag(512, "Side that images are prepared at, before the extractor's own resize.")
    remove_borders: bool = flag(True, "Cut uniform borders off.")
    max_unreadable: float = flag(0.05, "Largest tolerated fraction of images that cannot be read.")
    num_workers: int = flag(0, "Processes that load images.")


def main(args: Arguments) -> None:
    if args.data is None:
        raise ValueError("Name the images: --data SOURCE.")
    with hold_output(Path(args.output).parent, Path(args.output).name):
        device = device_of(0, args.device)
        extractor = open_extractor(args.extractor, args.weights, device, sha256=args.sha256)
        preprocessing = Preprocessing(args.resolution, args.remove_borders)
        images = open_images(args.data, preprocessing, split=args.split, max_unreadable=args.max_unreadable)
        if args.keys_file:
            images = images.select(read_keys(args.keys_file))
        features = extract_features(extractor, images, args.batch_size, num_workers=args.num_workers)
        features.save(args.output)
        print(f"{args.output}: {len(features)} of {len(images)} images, {json.dumps(features.spec.to_dict())}")
