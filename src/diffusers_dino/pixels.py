"""The only owner of pixel ranges: whatever a user has, the unit range, and the ranges that other models expect.

| input | range that is read |
| --- | --- |
| PIL, 8-bit modes (`1`, `L`, `LA`, `P`, `RGB`, `RGBA`, `CMYK`, ...) | 0..255; transparency is composited on black |
| PIL `I;16`, `I`; uint16, int16, uint32 and int32 arrays and tensors | the image's own minimum..maximum |
| uint8 arrays and tensors | 0..255 |
| bool arrays and tensors | False..True |
| PIL `F`; floating arrays and tensors | must be in [0, 1] already |

Layouts follow diffusers: `(H, W)`, `(H, W, C)` or `(N, H, W, C)` for NumPy, `(H, W)`, `(C, H, W)` or `(N, C, H, W)`
for torch; `C` is 1 (gray), 3 (RGB) or 4 (RGBA).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ImageInput",
    "center_square",
    "resize_unit",
    "to_unit",
    "unit_to_uint8",
    "unit_to_vae",
    "unit_to_xrv",
    "vae_to_unit",
    "with_channels",
]

Image: TypeAlias = PIL.Image.Image | np.ndarray | Tensor
ImageInput: TypeAlias = Image | list[Image] | tuple[Image, ...]

_FULL_SCALE = {torch.uint8: 255.0, torch.bool: 1.0}
_OWN_SCALE = (torch.uint16, torch.int16, torch.uint32, torch.int32)
_NARROW = 16  # times as high as wide
_PIECE = 2**20  # pixels that are stretched at a time
_ROUNDING = 1e-4  # how far a floating image may leave [0, 1] by rounding before it is refused


def to_unit(images: ImageInput) -> list[Tensor]:
    """Bring images of any accepted type to RGB in [0, 1].

    Args:
        images: A PIL image, an array, a tensor, a batch of either, or a list of them, sizes may differ; the module's
            table gives ranges and layouts. Integers of 16 and 32 bits have no range of their own (a radiograph uses
            10 to 16 of its bits), so each image is stretched from its minimum to its maximum; a constant one is black.

    Returns:
        One float32 tensor `(3, H, W)` in [0, 1] an image. Tensors keep their device and their autograd graph.

    Raises:
        TypeError: If an image is of a type that the table lacks.
        ValueError: If there are no images, or one has another layout, no pixels, NaN, or floats outside [0, 1].
    """
    listed = list(images) if isinstance(images, (list, tuple)) else [images]
    units = [unit for image in listed for unit in _unit(_batch(image))]
    if not units:
        raise ValueError("There is no image: the list or the batch is empty.")
    return units


def center_square(image: Tensor) -> Tensor:
    """The central square of images `(..., H, W)`."""
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[..., top : top + side, left : left + side]


def resize_unit(images: Tensor, size: int, resample: str) -> Tensor:
    """Bring `(N, C, H, W)` in [0, 1] to squares `(N, C, size, size)` in [0, 1], stretching what is not a square.

    `resample` is `"nearest"`, or antialiased `"bilinear"` or `"bicubic"`, whose overshoot is clipped.
    """
    if images.shape[-2:] == (size, size):
        return images
    smooth = resample != "nearest"
    options = {"align_corners": False, "antialias": True} if smooth else {}
    mode = resample if smooth else "nearest-exact"
    channels, (height, width) = images.shape[1], images.shape[-2:]
    if images.stride(1) == 0:  # gray that was expanded to RGB
        images = images[:, :1]
    if height > max(size, _NARROW * width):  # torch would make it wider first, at its full height
        # lying down, as torch 2.11 makes all rows of an antialiased result the first one where its width is 1
        images = F.interpolate(images.transpose(-1, -2), size=(width, size), mode=mode, **options).transpose(-1, -2)
    resized = F.interpolate(images, size=(size, size), mode=mode, **options).clamp(0, 1)
    return resized.expand(-1, channels, -1, -1)


def unit_to_vae(x: Tensor, channels: int) -> Tensor:
    """Bring `(..., 1 or 3, H, W)` in [0, 1] to `(..., channels, H, W)` in [-1, 1], an autoencoder's range."""
    return with_channels(x, channels) * 2 - 1


def vae_to_unit(x: Tensor) -> Tensor:
    """Bring an autoencoder's output of nominal range [-1, 1] to [0, 1], clipping what lies outside."""
    return (x / 2 + 0.5).clamp(0, 1)


def unit_to_uint8(x: Tensor) -> Tensor:
    """Round [0, 1] to uint8 in 0..255, clipping what lies outside."""
    return (x * 255).round().clamp(0, 255).to(torch.uint8)


def unit_to_xrv(x: Tensor) -> Tensor:
    """Bring `(..., 1 or 3, H, W)` in [0, 1] to TorchXRayVision's one channel `(..., 1, H, W)` in [-1024, 1024]."""
    return (with_channels(x, 1) * 2 - 1) * 1024


def with_channels(x: Tensor, channels: int) -> Tensor:
    """Bring `(..., 1 or 3, H, W)` to 1 or 3 channels, or raise a ValueError.

    Gray is the mean of red, green and blue, here and everywhere.
    """
    if x.ndim < 3 or x.shape[-3] not in (1, 3):
        raise ValueError(f"Expected images (..., 1 or 3, H, W), got shape {tuple(x.shape)}.")
    if channels not in (1, 3):
        raise ValueError(f"`channels` must be 1 or 3, got {channels}.")
    if x.shape[-3] == channels:
        return x
    return x.mean(-3, keepdim=True) if channels == 1 else x.expand(*x.shape[:-3], 3, *x.shape[-2:])


def _batch(image: Image) -> Tensor:
    """A PIL image, array or tensor as `(N, C, H, W)` in its own type and range."""
    if isinstance(image, PIL.Image.Image):
        image = _array(image)
    if isinstance(image, np.ndarray):
        layout = "(H, W), (H, W, C) or (N, H, W, C)"
        if image.dtype.kind not in "biuf":
            raise TypeError(f"An image array must hold numbers, got dtype {image.dtype}.")
        array = np.moveaxis(image, -1, -3) if image.ndim > 2 else image
        # torch knows neither negative strides nor foreign byte orders; the copy also protects the caller's array
        x = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    elif isinstance(image, Tensor):
        layout = "(H, W), (C, H, W) or (N, C, H, W)"
        x = image
    else:
        raise TypeError(
            f"An image must be a PIL image, a NumPy array or a torch tensor, got {type(image).__name__}. "
            "Open a path or an address with `diffusers.utils.load_image`."
        )
    if x.ndim not in (2, 3, 4):
        raise ValueError(f"Expected an image of layout {layout}, got shape {tuple(image.shape)}.")
    x = x[(None,) * (4 - x.ndim)]  # (N, C, H, W)
    if x.shape[1] not in (1, 3, 4):
        raise ValueError(
            f"Expected 1, 3 or 4 channels in the layout {layout}, got {x.shape[1]} (shape {tuple(image.shape)})."
        )
    if 0 in x.shape[2:]:
        raise ValueError(f"An image has no pixels: its shape is {tuple(image.shape)}.")
    return x


def _array(image: PIL.Image.Image) -> np.ndarray:
    """A PIL image as an array `(H, W)` or `(H, W, C)`: 8-bit modes as L, RGB or RGBA, the others with their depth."""
    if image.mode.startswith("I;16"):
        return np.array(image).astype(np.uint16)  # in the machine's byte order
    if image.mode in ("I", "F"):
        return np.array(image)
    if image.has_transparency_data:
        return np.array((image.convert("LA") if image.mode == "La" else image).convert("RGBA"))
    return np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def _unit(x: Tensor) -> Tensor:
    """Images `(N, 1 or 3 or 4, H, W)` of any range to `(N, 3, H, W)` float32 in [0, 1]."""
    if x.shape[1] == 3 and x.stride(1) == 0:  # gray that was expanded to RGB, such as this function's own
        x = x[:, :1]
    if x.is_floating_point():
        unit = _checked(x.float())
    elif x.dtype in _FULL_SCALE:
        unit = x.float().div_(_FULL_SCALE[x.dtype])
    elif x.dtype in _OWN_SCALE:
        unit = _stretched(x)
    else:
        raise TypeError(
            f"Images of {x.dtype} have no documented range: convert to uint8 (0..255), to uint16 or int32 (stretched "
            "from minimum to maximum), or to floats in [0, 1]."
        )
    if unit.shape[1] == 4:
        return unit[:, :3] * unit[:, 3:]
    return unit.expand(-1, 3, -1, -1)


def _checked(x: Tensor) -> Tensor:
    if not x.numel():
        return x
    low, high = (float(v) for v in torch.aminmax(x.detach()))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("An image contains NaN or infinity: clean it, or leave it out.")
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise ValueError(
            f"Floating images must be in [0, 1], got values in [{low:.4g}, {high:.4g}]: divide by the top of their "
            "range, or map [-1, 1] with (x + 1) / 2."
        )
    return x.clamp(0, 1)


def _stretched(x: Tensor) -> Tensor:
    """Each image from its own minimum to its own maximum."""
    if x.shape[1] == 4:
        raise TypeError(f"Alpha has no documented range in {x.dtype}: give RGBA as uint8 or as floats in [0, 1].")
    stretched = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    for image, result in zip(x, stretched, strict=True):
        rows = max(1, _PIECE // image[:, 0].numel())
        low = min(int(piece.long().min()) for piece in image.split(rows, dim=1))
        high = max(int(piece.long().max()) for piece in image.split(rows, dim=1))
        for piece, part in zip(image.split(rows, dim=1), result.split(rows, dim=1), strict=True):
            # exact differences, where float32 would round beyond 24 bits; in pieces, as int64 takes 8 bytes a pixel
            part.copy_((piece.long() - low).float() / max(high - low, 1))
    return stretched
