"""The bundled encoder: a small convolutional network for runs without published weights.

It shares nothing with a conditioner but the phantoms it saw: another architecture, another objective, one channel.
`tiny.md` beside this file is its card; `examples/train_tiny_extractor.py` trained it.
"""

from __future__ import annotations

from itertools import pairwise
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
_SHA256 = ""
_SIZE, _DIM = 64, 64


class TinyNetwork(nn.Module):
    """Four convolutions, a 2 x 2 grid of means, and a linear layer: 52 thousand weights.

    Input: images `(N, 1 or 3, H, H)` in [0, 1]. Output: `(N, 64)`.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 48)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairwise(widths)
        )
        self.refine = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.linear = nn.Linear(4 * widths[-1], _DIM)

    def forward(self, images: Tensor) -> Tensor:
        gray = images.mean(dim=1, keepdim=True)
        x = (resize_unit(gray, _SIZE, "bilinear") - 0.5) / 0.25  # (N, 1, 64, 64)
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        x = x + F.relu(self.refine(x))  # (N, 48, 8, 8)
        return self.linear(F.adaptive_avg_pool2d(x, 2).flatten(1))


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
