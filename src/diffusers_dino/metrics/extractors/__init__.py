"""From images to feature vectors: one small file for each family of extractors, and `open_extractor` for all."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .base import FeatureExtractor, FeatureSpec
from .files import read_config, require_local
from .thumbnails import THUMBNAILS, open_thumbnails, pixel_features
from .tiny import open_tiny

__all__ = ["EXTRACTORS", "FeatureExtractor", "FeatureSpec", "open_extractor", "pixel_features"]

EXTRACTORS = ("pixels", "local-contrast", "tiny", "xrv", "rad-dino", "dinov2", "inception", "timm/NAME")
_REPOSITORIES = {"rad-dino": "microsoft/rad-dino", "dinov2": "facebook/dinov2-large"}


def open_extractor(
    name: str,
    weights: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    *,
    sha256: str | None = None,
) -> FeatureExtractor:
    """Open a feature extractor. Nothing is ever downloaded: weights are a file or a folder on this machine.

    Args:
        name: One of

            - `"pixels"`: gray values of 16 x 16 px, without weights;
            - `"local-contrast"`: the same in units of the contrast around each pixel, to find copies;
            - `"tiny"`: a small network that comes with this package and was trained on phantoms only;
            - `"xrv"`: TorchXRayVision's DenseNet-121, layer `features2`;
            - `"rad-dino"`, `"dinov2"`: class token of a checkpoint of transformers;
            - `"inception"`: the one of the published FIDs;
            - `"timm/NAME"`: features of a model of timm, before its classifier;
            - a folder with a checkpoint of transformers or timm.
        weights: File or folder of the weights. The first two and a folder take none, and `"tiny"` has its own.
        device: Where it computes.
        sha256: What the SHA-256 of the weight file must be.

    Raises:
        ValueError: If the name is not known, weights are missing or do not fit, or their hash is wrong.
        ImportError: If a package that this extractor needs is not installed.
    """
    if name in THUMBNAILS:
        if weights is not None or sha256 is not None:
            raise ValueError(f"The extractor {name} has no weights: it takes neither a file of them nor a hash.")
        return open_thumbnails(name, device)
    if name == "tiny":
        return open_tiny(weights, device, sha256)
    # large libraries are imported only for the extractors that need them
    if name == "xrv":
        from .xrv import open_xrv

        return open_xrv(weights, device, sha256)
    if name == "inception":
        from .inception import open_inception

        return open_inception(weights, device, sha256)
    if name in _REPOSITORIES:
        from .transformer import open_transformer

        hint = f"`hf download {_REPOSITORIES[name]} --local-dir {name}`, then give the folder {name}."
        return open_transformer(name, require_local(name, weights, hint), device, sha256)
    if name.startswith("timm/"):
        from .timm_model import open_timm

        hint = f"`hf download {name} --local-dir FOLDER`, then give the folder."
        return open_timm(name.removeprefix("timm/"), require_local(name, weights, hint), device, sha256)
    if Path(name).is_dir():
        return _open_folder(Path(name), weights, device, sha256)
    raise ValueError(
        f"There is no feature extractor {name!r}: give one of {', '.join(EXTRACTORS)}, or a folder with a checkpoint."
    )


def _open_folder(
    folder: Path, weights: str | os.PathLike[str] | None, device: torch.device | str, sha256: str | None
) -> FeatureExtractor:
    if weights is not None:
        raise ValueError(f"{folder} holds its own weights: give a folder or a name with `weights`, not both.")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint of transformers or timm: it has no config.json.")
    config = read_config(folder)
    if "architecture" in config:
        from .timm_model import open_timm

        return open_timm(config["architecture"], folder, device, sha256)
    from .transformer import open_transformer

    return open_transformer(config.get("model_type", folder.name), folder, device, sha256)
