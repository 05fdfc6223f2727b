"""A small convolutional network for runs without published weights.

Its own weights are in this package, `weights/tiny.safetensors`, with a card. It shares nothing with the bundled
conditioner but the phantoms that both were trained on: another architecture, another objective, one channel.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ...pixels import resize_unit, with_channels
from .base import FeatureExtractor, FeatureSpec
from .files import checked_sha256, require_local

__all__ = ["TINY_WEIGHTS", "TinyNetwork", "open_tiny"]

TINY_WEIGHTS = Path(__file__).parent / "weights" / "tiny.safetensors"
_SIZE, _DIM = 64, 64
_HINT = "give a file of this network, or none for the weights that come with this package."


class TinyNetwork(nn.Module):
    """Two convolutions, a 4 x 4 grid of means, and a linear layer: 56 thousand weights.

    Input: images `(N, 1 or 3, H, H)` in [0, 1]. Output: `(N, 64)`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 5, stride=2, padding=2)
        self.second = nn.Conv2d(16, 48, 3, stride=2, padding=1)
        self.linear = nn.Linear(48 * 4 * 4, _DIM)

    def forward(self, images: Tensor) -> Tensor:
        """Features `(N, 64)` of images `(N, C, H, H)` in [0, 1]."""
        return self.linear(self.pooled(images))

    def pooled(self, images: Tensor) -> Tensor:
        """What the linear layer sees, `(N, 768)`."""
        x = (resize_unit(with_channels(images, 1), _SIZE, "bilinear") - 0.5) / 0.25  # (N, 1, 64, 64)
        x = F.relu(self.second(F.relu(self.first(x))))  # (N, 48, 16, 16)
        return F.avg_pool2d(x, 4).flatten(1)


def open_tiny(
    weights: str | os.PathLike[str] | None = None, device: torch.device | str = "cpu", sha256: str | None = None
) -> FeatureExtractor:
    """The extractor, from a file of its weights or those that come with this package; see `open_extractor`."""
    path = TINY_WEIGHTS if weights is None else require_local("tiny", weights, _HINT)
    found = checked_sha256(path, sha256)
    network = TinyNetwork()
    try:
        network.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the weights of the extractor tiny ({error}): {_HINT}") from error
    spec = FeatureSpec("tiny", "linear", _DIM, _SIZE, "gray, (x - 0.5) / 0.25", "bilinear, antialiased", found)
    return FeatureExtractor(spec, network, device)
