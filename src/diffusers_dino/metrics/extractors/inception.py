"""The Inception of the Fréchet Inception distance, by torch-fidelity.

This is the TensorFlow network of 2015 that published FIDs are computed with, resized TensorFlow 1's way, and not
torchvision's `inception_v3`, whose weights, padding and features are others.
"""

from __future__ import annotations

import os
import pickle

import torch
from torch import Tensor, nn

from ...extras import require
from ...pixels import unit_to_uint8, with_channels
from .base import FeatureExtractor, FeatureSpec
from .files import checked_sha256, require_local

__all__ = ["open_inception"]

# Of pt_inception-2015-12-05-6726825d.pth (pytorch-fid) and weights-inception-2015-12-05-6726825d.pth (torch-fidelity)
_PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_HINT = "give the file weights-inception-2015-12-05-6726825d.pth that torch-fidelity publishes."
_SIZE, _DIM = 299, 2048


class _Inception(nn.Module):
    """Images `(N, 1 or 3, H, H)` in [0, 1] to `(N, 2048)`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(unit_to_uint8(with_channels(images, 3)))[0]


def open_inception(
    weights: str | os.PathLike[str] | None, device: torch.device | str = "cpu", sha256: str | None = None
) -> FeatureExtractor:
    """The extractor, from the published weight file; see `open_extractor`.

    `sha256` is that of another file of the same architecture; by default it must be the published one.
    """
    path = require_local("inception", weights, _HINT)
    found = checked_sha256(path, sha256 or _PUBLISHED_SHA256)
    module = "torch_fidelity.feature_extractor_inceptionv3"
    make = require(module, "eval", "The extractor inception needs torch-fidelity").FeatureExtractorInceptionV3
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would also unpickle code
        network = make("inception", ["2048"], feature_extractor_weights_path=str(path))
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the weights of this Inception: {error}") from error
    resize = "bilinear as in TensorFlow 1, not antialiased"
    spec = FeatureSpec("inception", "2048 (pooled)", _DIM, _SIZE, "RGB, uint8, (x - 128) / 128", resize, found)
    return FeatureExtractor(spec, _Inception(network), device)
