"""From the bytes of a file to an array of its pixels, with nothing lost and nothing guessed."""

from __future__ import annotations

import io
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["IMAGE_EXTENSIONS", "RawLayout", "UnreadableImageError", "read_image"]

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "tif", "tiff", "webp", "bmp")
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")


class UnreadableImageError(ValueError):
    """A file that is damaged, or is no image of a kind that is read here. The message names it and the reason."""


@dataclass(frozen=True)
class RawLayout:
    """How the pixels lie in a file that has no header, row by row from the top left.

    JSRT's `.IMG` files are `RawLayout(2048, 2048, byte_order="big", bits=12, inverted=True)`.

    Args:
        width: Pixels in a row.
        height: Rows.
        dtype: `"uint8"` or `"uint16"`, how a pixel is stored.
        byte_order: `"little"` or `"big"`, which byte of a pixel of two is first.
        bits: How many of its bits a pixel uses, the lower ones; all of them by default.
        inverted: Whether large values are dark.

    Raises:
        ValueError: If a value is out of its range.
    """

    width: int
    height: int
    dtype: str = "uint16"
    byte_order: str = "little"
    bits: int | None = None
    inverted: bool = False

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"width and height must be at least 1 pixel, got {self.width} x {self.height}")
        if self.dtype not in ("uint8", "uint16"):
            raise ValueError(f"dtype must be uint8 or uint16, got {self.dtype!r}")
        if self.byte_order not in ("little", "big"):
            raise ValueError(f"byte_order must be little or big, got {self.byte_order!r}")
        width = 8 * np.dtype(self.dtype).itemsize
        if self.bits is not None and not 1 <= self.bits <= width:
            raise ValueError(f"bits must be in [1, {width}] for {self.dtype}, got {self.bits}")

    def decode(self, data: bytes) -> np.ndarray:
        """The pixels `(height, width)` in `data`, of type `dtype` and with large values bright.

        Raises:
            ValueError: If the data is of another size, or uses more bits.
        """
        stored = np.dtype(self.dtype).newbyteorder(">" if self.byte_order == "big" else "<")
        expected = self.width * self.height * stored.itemsize
        if len(data) != expected:
            raise ValueError(
                f"{self.width} x {self.height} pixels of {self.dtype} are {expected} bytes, not {len(data)}"
            )
        array = np.frombuffer(data, stored).reshape(self.height, self.width).astype(self.dtype)
        top = 2 ** (self.bits or 8 * stored.itemsize) - 1
        if array.max() > top:
            raise ValueError(f"it holds the value {array.max()}, more than {self.bits} bits. Is the byte order right?")
        return top - array if self.inverted else array


def read_image(
    source: str | PathLike[str] | bytes, name: str | None = None, raw: RawLayout | None = None
) -> np.ndarray:
    """Read an image file.

    Alpha is composited on black. A file that stores grayscale in three equal channels comes back as grayscale. The
    orientation noted in EXIF is applied. Of a file with several pages the first is read. Sixteen-bit and wider
    grayscale keeps its precision: values beyond 0..65535 and floating ones are mapped linearly to that range.

    Args:
        source: A path, or the bytes of a file.
        name: What to call it in an error message; by default the path.
        raw: How the pixels lie, for a file without a header.

    Returns:
        `(H, W)` or, for colour, `(H, W, 3)`; uint8, or uint16 for deeper grayscale.

    Raises:
        UnreadableImageError: If the file is missing, empty, truncated, damaged or no image.
    """
    name = name or ("an image in memory" if isinstance(source, bytes) else str(source))
    # Decoders raise almost any exception on damaged bytes (OSError, SyntaxError, struct.error, ZeroDivisionError ...).
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        if not data:
            raise UnreadableImageError("the file is empty")
        if raw:
            return raw.decode(data)
        with Image.open(io.BytesIO(data)) as image:
            array = _to_array(image)
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"Cannot read {name}: it is no image of a known format") from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UnreadableImageError(f"Cannot read {name}: {reason}") from error
    return array


def _to_array(image: Image.Image) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        return _deep_to_uint16(np.asarray(image))
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba).convert("RGB")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    array = np.asarray(image)
    if array.ndim == 3 and (array[..., :1] == array[..., 1:]).all():
        array = array[..., 0]
    return np.ascontiguousarray(array)


def _deep_to_uint16(array: np.ndarray) -> np.ndarray:
    """`(H, W)` of 16-bit, 32-bit or floating grayscale -> uint16."""
    if array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= 65535:
        return array.astype(np.uint16)
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise UnreadableImageError("it holds values that are not finite")
    low, high = values.min(), values.max()
    return np.round((values - low) * (65535 / max(high - low, np.finfo(np.float64).tiny))).astype(np.uint16)
