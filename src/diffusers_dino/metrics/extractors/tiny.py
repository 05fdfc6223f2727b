"""The bundled encoder: a small convolutional network for runs without published weights.

It shares nothing with a conditioner but the phantoms it saw: another architecture, another objective, one channel.
`tiny.md` beside this file is its card; `examples/train_tiny_extractor.py` trained it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ...pixels import resize_unit
from .base import FeatureExtractor, FeatureSpec
from .files import checked_sha256

__all__ = ["TinyNetwork", "open_tiny"]

_WEIGHTS = Path(__file__).with_name("tiny.safetensors")
_SHA256 = "63e65f4f3ce852d4a6be947121a090954ddb15d78befbb2cb99c0c169890cb18"
_SIZE, _DIM = 64, 64


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
        gray = images.mean(dim=1, keepdim=True)
        x = (resize_unit(gray, _SIZE, "bilinear") - 0.5) / 0.25  # (N, 1, 64, 64)
        x = F.relu(self.second(F.relu(self.first(x))))  # (N, 48, 16, 16)
        return F.avg_pool2d(x, 4).flatten(1)


def open_tiny(device: torch.device | str = "cpu") -> FeatureExtractor:
    """The bundled encoder as an extractor.

    Raises:
        ValueError: If the file that was installed with this package has changed.
    """
    sha256 = checked_sha256(_WEIGHTS, _SHA256)
    network = TinyNetwork()
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(_WEIGHTS).items()})
    spec = FeatureSpec("tiny", "linear", _DIM, _SIZE, "gray, (x - 0.5) / 0.25", "bilinear, antialiased", sha256)
    return FeatureExtractor(spec, network, device)
