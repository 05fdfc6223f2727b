"""Segments of an image at the thresholds that a visitor tries, and pictures of them."""

from __future__ import annotations

import colorsys
import hashlib
from collections import OrderedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import DiffSegPipeline, DinoDiffusionPipeline
from ..diffseg.attention import self_attention_layers
from ..diffseg.merging import suppress
from ..diffseg.settings import ALL_LAYERS, DiffSegSettings, noted_settings
from .reading import DISPLAY, SEEN, fitted, fitted_size

__all__ = ["Segmenter", "labels_of", "mask_image", "overlay", "palette"]

_LABELLED = 2048  # longer side at which segments are drawn; larger images take the nearest number


class Segmenter:
    """Segments of images, with the attention maps of the last few images and timesteps kept.

    Another threshold costs only the merging. Each of the maps `kept` takes s^4 numbers at attention of side s (67 MB
    for 64).

    Attributes:
        layers: All of the UNet's self-attention, then the names of its blocks, and what `settings` join by +.
        finest_layer: The last one of the decoder, which often segments better than all together.
        last_timestep: The largest one.
        settings: To begin with: those that were noted with the model, or the finest layer's at the first timestep.
        layer: Those layers, as one of `layers`.
    """

    def __init__(self, pipe: DinoDiffusionPipeline, kept: int = 8) -> None:
        blocks = list(dict.fromkeys(name.split(".transformer")[0] for name in self_attention_layers(pipe.denoiser)))
        self.layers = [ALL_LAYERS, *blocks]
        self.finest_layer = ([name for name in blocks if name.startswith("up_blocks")] or blocks)[-1]
        self.last_timestep = pipe.scheduler.config["num_train_timesteps"] - 1
        self.settings = noted_settings(pipe.denoiser.config) or DiffSegSettings(1, 0.2, (self.finest_layer,))
        self.layer = self.settings.joined_layers
        self.layers += [] if self.layer in self.layers else [self.layer]
        self._pipe = DiffSegPipeline.from_pipe(pipe)
        self._kept = kept
        self._maps: OrderedDict[tuple, Tensor] = OrderedDict()

    def segment(self, image: Image.Image, timestep: int, threshold: float, layer: str = ALL_LAYERS) -> Tensor:
        """`(K, s, s)`: a map of each segment of an image, that of the largest one first; see `labels_of`.

        The threshold is in units of the mean divergence of the image's maps; `layer` is one of `layers`.
        """
        key = hashlib.sha256(image.tobytes()).digest(), image.size, timestep, layer
        if key not in self._maps:
            layers = layer if layer == ALL_LAYERS else layer.split("+")
            self._maps[key] = self._pipe.attention_maps(fitted(image, SEEN), timestep, layers=layers)
        self._maps.move_to_end(key)
        if len(self._maps) > self._kept:
            self._maps.popitem(last=False)
        maps = self._maps[key]
        width, height = fitted_size(image, DISPLAY)
        output = self._pipe.segment(maps, threshold, relative_threshold=True, refine=True, output_size=(height, width))
        areas = torch.bincount(output.masks[0].flatten(), minlength=len(output.maps[0]))
        order = areas.argsort(descending=True, stable=True)
        return output.maps[0][order[: output.num_segments[0]]]


def labels_of(segments: Tensor, image: Image.Image) -> np.ndarray:
    """Numbers `(H, W)` uint8 of segments at an image's size, from their maps `(K, s, s)`; K is at most 256."""
    width, height = fitted_size(image, _LABELLED)
    labels = suppress(segments, (height, width)).to(torch.uint8).cpu().numpy()
    if (width, height) == image.size:
        return labels
    return np.asarray(Image.fromarray(labels).resize(image.size, Image.Resampling.NEAREST))


def palette() -> np.ndarray:
    """256 colours `(256, 3)` uint8, neighbours far apart: hues at steps of the golden ratio."""
    hues = (0.58 + 0.618034 * np.arange(256)) % 1
    return np.array([[round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.7, 1.0)] for hue in hues], np.uint8)


def overlay(image: Image.Image, labels: np.ndarray, opacity: float) -> Image.Image:
    """Segments `(H, W)` in colour over an image of their size, RGB."""
    return Image.blend(image.convert("RGB"), Image.fromarray(palette()[labels]), opacity)


def mask_image(labels: np.ndarray) -> Image.Image:
    """Segments as a picture with a palette: its pixels are their numbers, and a viewer shows their colours."""
    picture = Image.fromarray(labels)
    picture.putpalette(palette().tobytes())
    return picture
