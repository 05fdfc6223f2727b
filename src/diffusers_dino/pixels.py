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

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from .bands import bands, pixels_of

__all__ = [
    "ImageInput",
    "StoredImages",
    "central_window",
    "resize_unit",
    "stored_images",
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
_PIECE = 2**22  # values of images that are not resized channel by channel
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
    return [unit for each in stored_images(images) for unit in each.unit()]


def stored_images(images: ImageInput) -> list[StoredImages]:
    """Images as `to_unit` takes them, checked as there; one entry for each that was given, or for each batch."""
    listed = list(images) if isinstance(images, (list, tuple)) else [images]
    stored = [each if isinstance(each, StoredImages) else StoredImages.of(_batch(each)) for each in listed]
    if not any(map(len, stored)):
        raise ValueError("There is no image: the list or the batch is empty.")
    return stored


@dataclass(frozen=True)
class StoredImages:
    """N images of one size in the type that they came in, to be brought to RGB in [0, 1].

    There a pixel takes 12 bytes: large images are cropped, or resized channel by channel, before all are floats.

    Attributes:
        values: `(N, C, H, W)`, C being 1, 3 or 4.
        ranges: Minimum and maximum of each image, where that is the range that is read.
    """

    values: Tensor
    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, values: Tensor) -> StoredImages:
        """Raises as `to_unit` does."""
        if values.shape[1] == 3 and values.stride(1) == 0:  # gray that was expanded to RGB, such as `unit` gives
            values = values[:, :1]
        if values.is_floating_point():
            _check_floats(values)
        elif values.dtype in _OWN_SCALE:
            return cls(values, tuple(map(_extent, values)))
        elif values.dtype not in _FULL_SCALE:
            raise TypeError(
                f"Images of {values.dtype} have no documented range: convert to uint8 (0..255), to uint16 or int32 "
                "(stretched from minimum to maximum), or to floats in [0, 1]."
            )
        return cls(values)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.values.shape[-2:]
        return height, width

    def center_square(self) -> StoredImages:
        """The square in the middle of each."""
        rows, columns = central_window(*map(slice, self.size))
        return replace(self, values=self.values[..., rows, columns])

    def unit(self) -> Tensor:
        """`(N, 3, H, W)` float32 in [0, 1]; gray takes the memory of one channel."""
        return self._to_floats(slice(None)).expand(-1, 3, -1, -1)

    def resized(self, size: int, resample: str) -> Tensor:
        """`unit` through `resize_unit`: `(N, 3, size, size)`."""
        if self.values.numel() <= _PIECE:
            return resize_unit(self.unit(), size, resample)
        channels = {1: [[0]], 3: [[0], [1], [2]], 4: [[0, 3], [1, 3], [2, 3]]}[self.values.shape[1]]
        resized = torch.cat([resize_unit(self._to_floats(some), size, resample) for some in channels], dim=1)
        return resized.expand(-1, 3, -1, -1)

    def _to_floats(self, channels: slice | list[int]) -> Tensor:
        """Some channels as `(N, c, H, W)` float32 in [0, 1]; the last one of an even number is alpha."""
        parts = bands(self.size[0], self.values[..., 0, :].numel())
        converted = ((rows, self._convert(self.values[:, :, rows][:, channels])) for rows in parts)
        rows, first = next(converted)
        if rows.stop == self.size[0]:
            return first.contiguous()
        floats = first.new_empty(*first.shape[:2], *self.size)
        floats[:, :, rows] = first
        for rows, part in converted:
            floats[:, :, rows] = part
        return floats

    def _convert(self, part: Tensor) -> Tensor:
        if part.is_floating_point():
            unit = part.float().clamp(0, 1)
        elif part.dtype in _FULL_SCALE:
            unit = part.float().div_(_FULL_SCALE[part.dtype])
        else:  # exact differences, where float32 would round beyond 24 bits
            stretched = [
                (image.long() - low).float() / max(high - low, 1)
                for image, (low, high) in zip(part, self.ranges, strict=True)
            ]
            unit = torch.stack(stretched)
        return unit[:, :-1] * unit[:, -1:] if unit.shape[1] in (2, 4) else unit


def central_window(rows: slice, columns: slice) -> tuple[slice, slice]:
    """The largest centred square within some rows and columns of an image."""
    top, left = rows.start or 0, columns.start or 0
    height, width = rows.stop - top, columns.stop - left
    side = min(height, width)
    top, left = top + (height - side) // 2, left + (width - side) // 2
    return slice(top, top + side), slice(left, left + side)


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
        # torch knows neither negative strides nor foreign byte orders, nor arrays that must not be written to
        plain = array.dtype.isnative and array.flags.writeable and min(array.strides, default=0) >= 0
        x = torch.from_numpy(array if plain else np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
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
        return pixels_of(image).astype(np.uint16, copy=False)  # in the machine's byte order
    if image.mode in ("I", "F"):
        return pixels_of(image)
    if image.has_transparency_data:
        return pixels_of(image, lambda part: (part.convert("LA") if part.mode == "La" else part).convert("RGBA"))
    return pixels_of(image, lambda part: part.convert("L" if part.mode in ("1", "L") else "RGB"))


def _check_floats(values: Tensor) -> None:
    """Refuse floats that are not in [0, 1], give or take what rounding does."""
    if not values.numel():
        return
    parts = bands(values.shape[-2], values[..., 0, :].numel())
    limits = [torch.stack(torch.aminmax(values[..., rows, :].detach().float())) for rows in parts]
    low, high = (float(value) for value in torch.stack(torch.aminmax(torch.stack(limits))))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("An image contains NaN or infinity: clean it, or leave it out.")
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise ValueError(
            f"Floating images must be in [0, 1], got values in [{low:.4g}, {high:.4g}]: divide by the top of their "
            "range, or map [-1, 1] with (x + 1) / 2."
        )


def _extent(image: Tensor) -> tuple[int, int]:
    """Minimum and maximum of `(C, H, W)`."""
    if len(image) == 4:
        raise TypeError(f"Alpha has no documented range in {image.dtype}: give RGBA as uint8 or as floats in [0, 1].")
    limits = [  # numbers: small tensors that stay would keep the heap from using a band's memory again
        tuple(map(int, torch.aminmax(image[:, rows].long()))) for rows in bands(image.shape[1], image[:, 0].numel())
    ]
    return min(low for low, _ in limits), max(high for _, high in limits)
