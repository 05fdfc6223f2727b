"""DINOv2, RAD-DINO and the other vision transformers that can be an encoder, from a local folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from ...encoders import Encoder, EncoderSpec, load_encoder
from ...pixels import resize_unit, with_channels
from .base import FeatureExtractor, FeatureSpec
from .files import folder_sha256

__all__ = ["open_transformer"]


class _ClassToken(nn.Module):
    """Images `(N, 1 or 3, H, H)` in [0, 1] to `(N, D)`: the class token, or the mean of the patches without one."""

    def __init__(self, spec: EncoderSpec, model: nn.Module) -> None:
        super().__init__()
        with init_empty_weights():
            self.encoder = Encoder(spec)
        self.encoder.model = model

    def forward(self, images: Tensor) -> Tensor:
        spec = self.encoder.spec
        prefix, patches = self.encoder(resize_unit(with_channels(images, 3), spec.size, spec.resample))
        return prefix[:, 0] if self.encoder.has_class_token else patches.mean(dim=1)


def open_transformer(
    name: str, folder: str | os.PathLike[str], device: torch.device | str = "cpu", sha256: str | None = None
) -> FeatureExtractor:
    """An extractor from a folder with `config.json`, `preprocessor_config.json` and `model.safetensors`.

    Size, mean and std are those of its image processor.
    """
    folder = Path(folder)
    encoder_spec, model = load_encoder(folder)
    network = _ClassToken(encoder_spec, model)
    has_token = network.encoder.has_class_token
    mean, std = ([round(x, 6) for x in values] for values in (encoder_spec.mean, encoder_spec.std))
    spec = FeatureSpec(
        extractor=name,
        layer="class token after the last norm" if has_token else "mean of the patch tokens after the last norm",
        dim=network.encoder.width,
        input_size=encoder_spec.size,
        pixel_range=f"RGB, (x - {mean}) / {std}",
        resize=f"{encoder_spec.resample}, antialiased",
        weights_sha256=folder_sha256(folder, sha256),
    )
    return FeatureExtractor(spec, network, device)
