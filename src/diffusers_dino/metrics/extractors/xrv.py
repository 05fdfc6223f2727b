"""TorchXRayVision's DenseNet-121 `densenet121-res224-all`, layer `features2`.

The weights are published as the pickle of a whole model, and a pickle can run any code: `convert_xrv_weights` reads it
once, where its hash is known, and leaves a file of tensors. Computing features then needs no torchxrayvision.

Source: Cohen et al., TorchXRayVision: A library of chest X-ray datasets and models, MIDL 2022.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import DenseNet

from ...extras import require
from ...files import atomic_write
from ...pixels import unit_to_xrv
from .base import FeatureExtractor, FeatureSpec
from .files import checked_sha256, require_local, write_sha256

__all__ = ["PUBLISHED_SHA256", "XrvNetwork", "convert_xrv_weights", "open_xrv"]

# Of nih-pc-chex-mimic_ch-google-openi-kaggle-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt (28,382,008
# bytes) in torchxrayvision's release v1. The authors publish no hash; projects that use the file agree on this one.
PUBLISHED_SHA256 = "56524913dd16a906422e8d8b66a7a5c46be1d82eb7ac012d8103776f1aa68899"
_SIZE, _DIM = 224, 1024
_HINT = "fetch torchxrayvision's published file, convert it with `convert_xrv_weights`, and give the result."


class XrvNetwork(nn.Module):
    """Images `(N, 1 or 3, H, H)` in [0, 1] to `features2` `(N, 1024)`: the last maps after ReLU, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.features = DenseNet(growth_rate=32, block_config=(6, 12, 24, 16), num_init_features=64).features
        self.features.conv0 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """`features2`, `(N, 1024)`, of gray images `(N, 1, H, H)` in [0, 1]."""
        x = unit_to_xrv(images)  # (N, 1, H, H) in [-1024, 1024]
        if x.shape[-1] != _SIZE:  # as torchxrayvision.utils.fix_resolution, after the change of range
            x = F.interpolate(x, size=(_SIZE, _SIZE), mode="bilinear", antialias=True)
        return F.relu(self.features(x)).mean(dim=(2, 3))


def open_xrv(
    weights: str | os.PathLike[str] | None, device: torch.device | str = "cpu", sha256: str | None = None
) -> FeatureExtractor:
    """The extractor, from the file that `convert_xrv_weights` wrote; see `open_extractor`."""
    path = require_local("xrv", weights, _HINT)
    if path.suffix != ".safetensors":
        raise ValueError(f"The extractor xrv reads only safetensors, got {path.name}: {_HINT}")
    found = checked_sha256(path, sha256)
    network = XrvNetwork()
    try:
        _load(network, load_file(path), path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): convert the published file again.") from error
    spec = FeatureSpec("xrv", "features2", _DIM, _SIZE, "gray, [-1024, 1024]", "bilinear, antialiased", found)
    return FeatureExtractor(spec, network, device)


def convert_xrv_weights(
    weights: str | os.PathLike[str], output: str | os.PathLike[str], sha256: str | None = None
) -> str:
    """Turn the published pickle into safetensors, with its hash in `OUTPUT.sha256` for every later use.

    The same file always gives the same bytes, whose SHA-256 is returned. Needs torchxrayvision, since the pickle names
    its classes. `sha256` is that of another file of the same architecture that you trust; by default it must be the
    published one. ValueError if the hash is another, or the file holds another network or more than one.
    """
    source, output = require_local("xrv", weights, "give the file that torchxrayvision published."), Path(output)
    if output.suffix != ".safetensors":
        raise ValueError(f"The converted weights are safetensors: {output.name} should end in .safetensors.")
    found = checked_sha256(source, sha256)
    if sha256 is None and found != PUBLISHED_SHA256:
        raise ValueError(
            f"{source} has the SHA-256 {found}, the published densenet121-res224-all {PUBLISHED_SHA256}. If you trust "
            "this file, and it is the same network with other weights, give its hash as `sha256`."
        )
    tensors = _tensors_of(_unpickle(source, found))
    network = XrvNetwork()
    _load(network, tensors, source)
    with atomic_write(output) as file:
        # one entry: several would come in any order, and the hash would change with it
        file.write(save(network.state_dict(), metadata={"source_sha256": found}))
    return write_sha256(output)


def _unpickle(path: Path, found: str) -> Any:
    """The model, by torch's reader, which builds only known classes. The published file may be read by any means."""
    models = require("torchxrayvision.models", "eval", "Reading torchxrayvision's file needs it")
    known = [value for value in vars(models).values() if isinstance(value, type) and issubclass(value, nn.Module)]
    known += [value for value in vars(nn).values() if isinstance(value, type)] + [set]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        if found != PUBLISHED_SHA256:
            raise ValueError(f"{path} is not a model of torchxrayvision, or more than one: {error}") from error
        return torch.load(path, map_location="cpu", weights_only=False)  # what torchxrayvision itself does with it


def _tensors_of(model: Any) -> dict[str, Tensor]:
    """Weights of a module or a state dict. Modules from before torch 1.6 lack what `state_dict` asks for."""
    if isinstance(model, nn.Module):
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if isinstance(model, Mapping) and all(isinstance(value, Tensor) for value in model.values()):
        return dict(model)
    raise ValueError(f"Expected a model or a state dict in the file, found {type(model).__name__}.")


def _load(network: XrvNetwork, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Fill the network; the classifier is not needed here."""
    state = {name: value for name, value in tensors.items() if name.startswith("features.")}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} holds another network than TorchXRayVision's DenseNet-121: {error}") from error
