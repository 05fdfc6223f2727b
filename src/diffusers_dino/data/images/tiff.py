"""TIFF files with more than 8 bits or signed values: Pillow reads some of these kinds as other pictures.

Source: TIFF 6.0 (1992); tags 32997 and 339 from its supplements.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
from PIL import TiffImagePlugin

from .errors import UnreadableImageError, check_size

__all__ = ["native_order", "read_plain_tiff", "restore_values"]

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIPS, _SAMPLES, _ROWS_PER_STRIP, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _TILES = 273, 277, 278, 284, 322, 323, 324
_ORIENTATION, _EXTRA_SAMPLES, _FORMAT, _DEPTH = 274, 338, 339, 32997
_WHITE_IS_ZERO, _RGB = 0, 2
# How an image that is stored in another orientation is turned upright.
_TURNS = {
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: np.rot90,
}


def read_plain_tiff(data: bytes, max_pixels: int) -> np.ndarray | None:
    """The values of an uncompressed TIFF of 16 or more bits, or with signed ones; None for other kinds.

    They are `(H, W)`, `(H, W, 3)` or, with alpha, uint16 `(H, W, 4)`; large ones are bright.
    """
    tags = _tags(data)
    if tags.get(_DEPTH, 1) > 1:
        raise UnreadableImageError("it holds a volume of several planes. Export the one to read")
    dtype = _stored_type(tags, data)
    samples, photometric = tags.get(_SAMPLES, 1), tags.get(_PHOTOMETRIC)
    if dtype is None or tags.get(_COMPRESSION, 1) != 1:
        return None
    with_alpha = samples == 4 and tags.get(_EXTRA_SAMPLES, (0,))[0] in (1, 2) and dtype.str[1:] == "u2"
    if not (samples == 1 and photometric in (0, 1)) and not (photometric == _RGB and (samples == 3 or with_alpha)):
        return None
    check_size(tags[_WIDTH], tags[_HEIGHT], max_pixels, samples * dtype.itemsize)
    values = _join_parts(data, tags, dtype, samples)
    values = values[..., 0] if samples == 1 else values
    return _TURNS.get(tags.get(_ORIENTATION), lambda image: image)(_bright(values, photometric))


def native_order(raw_mode: str) -> str:
    """The raw mode of signed or floating values that libtiff unpacks: it turns their bytes over as it does."""
    return re.sub(r"(16|32)B?([SF])$", r"\1N\2", raw_mode)


def restore_values(array: np.ndarray, image: TiffImagePlugin.TiffImageFile) -> np.ndarray:
    """What a file says, from the array of gray pixels that Pillow makes of it."""
    tags = image.tag_v2
    if array.ndim != 2 or array.dtype.itemsize > 4:
        return array
    kind = tags.get(_FORMAT, (1,))[0]
    if array.dtype == np.uint8 and kind == 2:
        array = array.view(np.int8)
    elif array.dtype == np.int32 and kind == 1 and tags.get(_BITS, (1,))[0] == 32:
        array = array.view(np.uint32)
    deep = array.dtype.itemsize > 1 or array.dtype.kind == "i"
    return _bright(array, tags.get(_PHOTOMETRIC)) if deep else array  # of 8 bits Pillow knows that


def _tags(data: bytes) -> dict[int, Any]:
    big = data[2:4] in (b"\x2b\0", b"\0\x2b")
    directory = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if big else 8])
    file = io.BytesIO(data)
    file.seek(directory.next)
    directory.load(file)
    return dict(directory)


def _stored_type(tags: dict[int, Any], data: bytes) -> np.dtype | None:
    """The type of each value, None if that is an ordinary one of at most 8 bits, or an unknown one."""
    bits, kinds = tags.get(_BITS, (1,)), set(tags.get(_FORMAT, (1,)))
    kind = {1: "u", 2: "i", 3: "f"}.get(kinds.pop()) if len(kinds) == 1 else None
    if kind is None or len(set(bits)) > 1 or tags.get(_FILL_ORDER, 1) != 1:
        return None
    if bits[0] not in (8, 16, 32, 64) or (bits[0] == 8 and kind != "i"):
        return None
    return np.dtype(f"{'<' if data.startswith(b'II') else '>'}{kind}{bits[0] // 8}")


def _join_parts(data: bytes, tags: dict[int, Any], dtype: np.dtype, samples: int) -> np.ndarray:
    """Put the strips or tiles together: `(H, W, samples)`, in the machine's byte order."""
    width, height = tags[_WIDTH], tags[_HEIGHT]
    tiled = _TILES in tags
    wide = tags[_TILE_WIDTH] if tiled else width
    tall = tags[_TILE_HEIGHT] if tiled else min(tags.get(_ROWS_PER_STRIP, height), height)
    channels = 1 if tags.get(_PLANAR, 1) == 2 else samples
    offsets = tags[_TILES if tiled else _STRIPS]
    offsets = offsets if isinstance(offsets, tuple) else (offsets,)
    if min(wide, tall) < 1 or len(data) < width * height * samples * dtype.itemsize:
        raise UnreadableImageError("it is cut short: its pixels take more bytes than it has")
    across, down = -(-width // wide), -(-height // tall)
    if len(offsets) != across * down * (samples // channels):
        raise UnreadableImageError(f"its parts do not cover its {width} x {height} pixels")
    values = np.empty((height, width, samples), dtype.newbyteorder("="))
    for number, offset in enumerate(offsets):
        plane, place = divmod(number, across * down)
        top, left = place // across * tall, place % across * wide
        rows = tall if tiled else min(tall, height - top)
        part = data[offset : offset + rows * wide * channels * dtype.itemsize]
        if len(part) < rows * wide * channels * dtype.itemsize:
            raise UnreadableImageError("it is cut short: a part of its pixels is not there")
        block = np.frombuffer(part, dtype).reshape(rows, wide, channels)
        into = values[top : top + tall, left : left + wide, plane : plane + channels]
        into[:] = block[: into.shape[0], : into.shape[1]]
    return values


def _bright(values: np.ndarray, photometric: int | None) -> np.ndarray:
    """Large values bright, also where the file says that white is 0."""
    if photometric != _WHITE_IS_ZERO:
        return values
    return -values if values.dtype.kind == "f" else ~values  # of integers the same as largest - value (+ smallest)
