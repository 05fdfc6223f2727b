"""Any image model of timm, by the features that its classifier would see."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...pixels import resize_unit, with_channels
from .base import FeatureExtractor, FeatureSpec
from .files import checked_sha256, read_config

__all__ = ["open_timm"]

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


class _Pooled(nn.Module):
    """Images `(N, 1 or 3, H, H)` in [0, 1] to `(N, D)`: what comes before the classifier."""

    def __init__(self, model: nn.Module, size: int, resample: str, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model, self.size, self.resample = model, size, resample
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = with_channels(images, self.mean.shape[1])
        return self.model((resize_unit(x, self.size, self.resample) - self.mean) / self.std)


def open_timm(
    name: str, weights: str | os.PathLike[str], device: torch.device | str = "cpu", sha256: str | None = None
) -> FeatureExtractor:
    """An extractor from timm's weights, with the size, mean, std and resampling that belong to them.

    `weights` is a folder with `config.json` and `model.safetensors` as the Hub has them, or only the latter file: then
    the tag of the name (`resnet50.a1_in1k`) tells the preprocessing.
    """
    path = Path(weights)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        raise FileNotFoundError(f"timm's weights are a .safetensors file or a folder with model.safetensors: {path}.")
    held = read_config(path).get("architecture", "another model") if path.is_dir() else name
    if held.split(".")[0] != name.split(".")[0]:
        raise ValueError(f"{path} holds {held}, not {name}.")
    found = checked_sha256(file, sha256)
    model, data = _load(name, path, file)
    size = data["input_size"][-1]
    network = _Pooled(model, size, data["interpolation"], list(data["mean"]), list(data["std"]))
    channels = "gray" if network.mean.shape[1] == 1 else "RGB"
    spec = FeatureSpec(
        extractor=f"timm/{name}",
        layer="pooled, before the classifier",
        dim=_width(model, data["input_size"]),
        input_size=size,
        pixel_range=f"{channels}, (x - {list(data['mean'])}) / {list(data['std'])}",
        resize=f"{data['interpolation']}, antialiased",
        weights_sha256=found,
    )
    return FeatureExtractor(spec, network, device)


def _load(name: str, path: Path, file: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model without its classifier, and its preprocessing."""
    try:
        source = f"local-dir:{path}" if path.is_dir() else name
        model = timm.create_model(source, pretrained=False, num_classes=0).eval()
    except RuntimeError as error:
        raise ValueError(f"timm cannot build {name!r}: {error}") from error
    try:
        # timm's own loading warns of missing weights, and goes on with random ones
        missing, _ = model.load_state_dict(load_file(file), strict=False)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{file} does not hold the weights of {name}, or is damaged: {error}") from error
    if missing:
        raise ValueError(
            f"{file} does not hold the weights of {name}: {', '.join(missing[:3])} and others are missing."
        )
    data = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    if data["input_size"][-1] != data["input_size"][-2]:
        raise ValueError(f"{name} takes images of {data['input_size']}, and only square ones are supported.")
    if data["interpolation"] not in _INTERPOLATIONS:
        raise ValueError(f"{name} asks for {data['interpolation']} resampling, which torch lacks.")
    return model, data


@torch.no_grad()
def _width(model: nn.Module, input_size: tuple[int, ...]) -> int:
    features = model(torch.zeros(1, *input_size))
    if features.ndim != 2:
        raise ValueError(f"{type(model).__name__} gives features {tuple(features.shape)}, not one vector an image.")
    return features.shape[1]
