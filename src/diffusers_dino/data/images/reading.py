"""From the bytes of a file to an array of its pixels, with nothing lost.

The first bytes, not the name, tell the format. Nothing is decoded before its size is known and allowed.
"""

from __future__ import annotations

import io
import math
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import PurePath
from typing import Any, BinaryIO

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from ...bands import bands, map_bands, pixels_of
from ...files import read_regular
from .dicom import read_dicom
from .dicom_header import is_dicom
from .errors import MAX_PIXELS, NoImageError, UnreadableImageError, check_size
from .tiff import native_order, read_plain_tiff, restore_values

__all__ = ["IMAGE_EXTENSIONS", "RawLayout", "as_image", "is_image_file", "read_image"]

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "tif", "tiff", "webp", "bmp", "dcm", "dicom", "npy", "npz")

# Of files beside images, which are not opened to see whether they are DICOM.
_OTHER_EXTENSIONS = (
    *("json", "jsonl", "txt", "csv", "tsv", "xml", "html", "htm", "md", "yaml", "yml", "toml", "log", "pdf", "py"),
    *("tar", "zip", "gz", "tgz", "bz2", "xz", "7z", "parquet", "arrow", "xls", "xlsx", "pkl", "safetensors", "pt"),
)
# Opened by their own classes: `Image.open` would try every format that is installed, some of which run programs.
_PILLOW = (
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"II", TiffImagePlugin.TiffImageFile),
    (b"MM", TiffImagePlugin.TiffImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"GIF8", GifImagePlugin.GifImageFile),  # JSRT's masks
)
# Those whose decoders write each pixel where Pillow tells them to.
_DECODE_TO_MEMORY = (JpegImagePlugin.JpegImageFile, PngImagePlugin.PngImageFile)
_Opener = Callable[[BinaryIO], ImageFile.ImageFile]
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
_ORIENTATION = 0x0112


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
        """The pixels `(height, width)`, large values bright; `ValueError` if the size or the bits are wrong."""
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
    source: str | PathLike[str] | bytes,
    name: str | Callable[[], str] | None = None,
    raw: RawLayout | None = None,
    inverted: bool | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Read an image file: JPEG, PNG, TIFF, WebP, BMP, GIF, NumPy (`.npy`, `.npz`) or DICOM.

    Alpha is composited on black. A file that stores grayscale in three equal channels comes back as grayscale. The
    orientation noted in EXIF is applied. Of a file with several pages the first is read; a DICOM file with several
    images is refused. Sixteen-bit and wider grayscale keeps its precision: values beyond 0..65535 and floating ones
    are mapped linearly to that range, colour of more than 8 bits to 0..255. See `read_dicom` for DICOM.

    Args:
        source: A path, or the bytes of a file.
        name: What to call it in an error message, or a function that tells it; by default the path.
        raw: How the pixels lie, for a file without a header.
        inverted: Whether large values are dark; by default as a DICOM file or `raw` says. Other formats do not say.
        max_pixels: Width times height of the largest image that is decoded.

    Returns:
        `(H, W)` or, for colour, `(H, W, 3)`; uint8, or uint16 for deeper grayscale. Large values are bright.

    Raises:
        UnreadableImageError: If the file is missing, empty, truncated, damaged, too large or not an image.
    """
    name = name or ("an image in memory" if isinstance(source, bytes) else str(source))
    tell = name if callable(name) else lambda: name
    # Decoders raise almost any exception on damaged bytes (OSError, SyntaxError, struct.error, ZeroDivisionError ...).
    try:
        # The largest image takes less uncompressed.
        data = source if isinstance(source, bytes) else read_regular(source, 8 * max_pixels + 2**26)
        if not data:
            raise UnreadableImageError("the file is empty")
        if raw:
            check_size(raw.width, raw.height, max_pixels)
            return (raw if inverted is None else replace(raw, inverted=inverted)).decode(data)
        return _decode(data, tell, inverted, max_pixels)
    except ImportError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        kind = NoImageError if isinstance(error, NoImageError) else UnreadableImageError
        raise kind(f"Cannot read {tell()}: {reason}") from error


def is_image_file(path: str | PathLike[str]) -> bool:
    """Whether a file is an image: by its extension or, whatever else it is called, by DICOM content.

    Files with an extension of text, tables or archives are not opened. `OSError` if another one cannot be.
    """
    extension = PurePath(path).suffix[1:].lower()
    if extension in IMAGE_EXTENSIONS or extension in _OTHER_EXTENSIONS:
        return extension in IMAGE_EXTENSIONS
    if PurePath(path).name.upper() == "DICOMDIR":  # the index of a medium
        return False
    with open(path, "rb") as file:
        return is_dicom(file.read(132))


def _decode(data: bytes, name: Callable[[], str], inverted: bool | None, max_pixels: int) -> np.ndarray:
    if is_dicom(data):
        return _without_equal_channels(read_dicom(data, name(), inverted=inverted, max_pixels=max_pixels))
    if data.startswith(b"\x93NUMPY"):
        array = _read_npy(io.BytesIO(data), max_pixels)
    elif data.startswith(b"PK\x03\x04"):
        array = _read_npz(data, max_pixels)
    else:
        array = _read_pillow(data, max_pixels)
    array = _without_equal_channels(array)
    return _turned_over(array) if inverted else array


def _read_pillow(data: bytes, max_pixels: int) -> np.ndarray:
    opener = next((opener for start, opener in _PILLOW if data.startswith(start)), None)
    if opener is None:
        raise UnreadableImageError("it is not an image of a known format")
    is_tiff = opener is TiffImagePlugin.TiffImageFile
    if is_tiff and (values := read_plain_tiff(data, max_pixels)) is not None:
        return as_image(_without_alpha(values) if values.shape[2:] == (4,) else values)
    with opener(io.BytesIO(data)) as image:
        check_size(*image.size, max_pixels, _bytes_per_pixel(image))
        if is_tiff:
            _check_cover(image)
        if image.mode in ("RGB", "RGBA") and ";16" in _raw_mode(image):
            return _read_deep_color(data, opener, _raw_mode(image))
        return _to_array(image)


def _bytes_per_pixel(image: ImageFile.ImageFile) -> int:
    """What decoding takes for each pixel."""
    if isinstance(image, WebPImagePlugin.WebPImageFile):  # its decoder keeps two frames
        return 8
    deep = image.mode in ("RGB", "RGBA") and ";16" in _raw_mode(image)
    sizes = {"1": 1, "L": 1, "I;16": 2, "I;16B": 2, "P": 3, "RGB": 3}
    return sizes.get(image.mode, 4) * (2 if deep else 1)


def _to_array(image: Image.Image) -> np.ndarray:
    opened = image
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tile and image.tile[0][0] == "libtiff":
        image.tile = [_with_raw_mode(tile, native_order(_raw_mode(image))) for tile in image.tile]
    pixels = _decode_gray(image) if image.mode == "L" and isinstance(image, _DECODE_TO_MEMORY) else None
    if image.getexif().get(_ORIENTATION, 1) != 1:  # a PNG may hold it behind the pixels, and decodes them to look
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")) or (isinstance(opened, TiffImagePlugin.TiffImageFile) and image.mode == "L"):
        array = pixels_of(image)
        array = restore_values(array, opened) if isinstance(opened, TiffImagePlugin.TiffImageFile) else array
        return array if array.dtype == np.uint8 else _deep_to_uint16(array)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return pixels_of(image, _on_black)
    if image.mode not in ("L", "RGB"):
        mode = "L" if image.mode == "1" else "RGB"
        return pixels_of(image, lambda part: part.convert(mode))
    return pixels_of(image) if pixels is None or image is not opened else pixels


def _on_black(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba).convert("RGB")


def _decode_gray(image: ImageFile.ImageFile) -> np.ndarray:
    """The pixels of an image of mode L. Pillow decodes to memory that it is lent, which saves two copies of them."""
    pixels = np.empty(image.size[::-1], np.uint8)
    lent = Image.frombuffer("L", image.size, pixels, "raw", "L", 0, 1).im
    image.im = lent
    image.load()
    return pixels if image.im is lent else np.asarray(image)


def _check_cover(image: TiffImagePlugin.TiffImageFile) -> None:
    """Refuse a TIFF whose strips or tiles hold less than the size that it claims: the rest would be made up."""
    boxes = (tile[1] for tile in image.tile)
    covered = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
    if covered < image.width * image.height:
        raise UnreadableImageError(f"its parts do not cover its {image.width} x {image.height} pixels")


def _read_deep_color(data: bytes, opener: _Opener, raw_mode: str) -> np.ndarray:
    """An image with 16 bits for each of several channels, which lie in the file as `raw_mode` says, such as `RGB;16B`.

    Pillow keeps the upper byte of each. Told the other byte order, it keeps the lower one.
    """
    if raw_mode.startswith("LA"):  # as large as RGBA with 8 bits
        both = _decode_as(data, opener, "RGBA")
        upper, lower = both[..., ::2], both[..., 1::2]
    else:
        little_endian = raw_mode[-1] == "L" or (raw_mode[-1] == "N" and sys.byteorder == "little")
        upper = _decode_as(data, opener, raw_mode)
        lower = _decode_as(data, opener, raw_mode[:-1] + ("B" if little_endian else "L"))
    array = np.empty((*upper.shape[:2], upper.shape[2] - (upper.shape[2] != 3)), np.uint16)
    for rows in bands(len(upper), upper[0].size):
        deep = upper[rows].astype(np.uint16) << 8 | lower[rows]
        array[rows] = deep if deep.shape[2] == 3 else _without_alpha(deep)
    return as_image(array)


def _without_alpha(array: np.ndarray) -> np.ndarray:
    """Put uint16 `(H, W, C)`, whose last channel is alpha, on black."""
    color, alpha = array[..., :-1].astype(np.float32), array[..., -1:]
    return np.round(color * (alpha / np.float32(65535))).astype(np.uint16)


def _decode_as(data: bytes, opener: _Opener, raw_mode: str) -> np.ndarray:
    with opener(io.BytesIO(data)) as image:
        image.tile = [_with_raw_mode(tile, raw_mode) for tile in image.tile]
        image.load()
        return pixels_of(image)


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """How the channels lie in the file; empty if the format does not say."""
    arguments = image.tile[0][3] if image.tile else ""
    first = arguments if isinstance(arguments, str) else next(iter(arguments or ()), "")
    return first if isinstance(first, str) else ""


def _with_raw_mode(tile: tuple[Any, ...], raw_mode: str) -> tuple[Any, ...]:
    """The same part of an image, whose decoder's arguments are the raw mode or begin with it."""
    parts = (*tile[:3], raw_mode if isinstance(tile[3], str) else (raw_mode, *tile[3][1:]))
    return type(tile)(*parts) if hasattr(tile, "_fields") else parts  # a named tuple since Pillow 11


def _read_npz(data: bytes, max_pixels: int) -> np.ndarray:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        arrays = [member for member in archive.infolist() if member.filename.endswith(".npy")]
        if len(arrays) != 1:
            arrays = [member for member in arrays if member.filename == "image.npy"]
        if len(arrays) != 1:
            raise UnreadableImageError("it must hold one array, or one named image")
        if arrays[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UnreadableImageError("it is compressed in another way than NumPy's")
        with archive.open(arrays[0]) as file:
            return _read_npy(file, max_pixels)


def _read_npy(file: BinaryIO, max_pixels: int) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise UnreadableImageError("it is of a version of NumPy's format that images do not need")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(file)
    if dtype.kind not in "buif":
        raise UnreadableImageError("it holds no numbers (pickled objects are never loaded)")
    height, width, *channels = _image_shape(shape)
    check_size(width, height, max_pixels, dtype.itemsize * math.prod(channels))
    size = math.prod(shape) * dtype.itemsize
    values = file.read(size)
    if len(values) != size:
        raise UnreadableImageError(f"it is cut short: {len(values)} of {size} bytes")
    return as_image(np.frombuffer(values, dtype).reshape(shape, order="F" if fortran_order else "C"))


def _image_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`(H, W)` or `(H, W, 3)` for the shape of an array, which may have axes of 1 besides."""
    while len(shape) > 2 and 1 in (shape[0], shape[-1]):
        shape = shape[1:] if shape[0] == 1 else shape[:-1]
    if len(shape) != 2 and (len(shape) != 3 or shape[2] != 3):
        raise UnreadableImageError(f"its shape {shape} is neither (H, W) nor (H, W, 3)")
    return shape


def as_image(array: np.ndarray) -> np.ndarray:
    """Bring `(H, W)` or `(H, W, 3)`, besides axes of 1, to what `read_image` returns; raises `UnreadableImageError`.

    Booleans are black and white; uint8 and uint16 grayscale stay as they are; others are mapped as `read_image` says.
    """
    array = array.reshape(_image_shape(array.shape))
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    array = _without_equal_channels(array)
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "uif":
        raise UnreadableImageError(f"its values are of type {array.dtype}, which is not a number")
    return _deep_to_uint16(array) if array.ndim == 2 else _stretched(array, 255, np.uint8)


def _deep_to_uint16(array: np.ndarray) -> np.ndarray:
    """`(H, W)` of 16-bit, 32-bit or floating grayscale -> uint16."""
    if array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= 65535:
        return array.astype(np.uint16)
    return _stretched(array, 65535, np.uint16)


def _stretched(array: np.ndarray, top: int, dtype: type) -> np.ndarray:
    """Minimum..maximum of an array to 0..top, calculated in float64."""
    low, high = np.float64(array.min()), np.float64(array.max())
    with np.errstate(over="ignore", invalid="ignore"):
        extent = high - low
    if not np.isfinite(extent):
        raise UnreadableImageError("it holds values that are not finite")
    extent = max(extent, np.finfo(np.float64).tiny)
    return map_bands(lambda some: np.round((some.astype(np.float64) - low) / extent * top), array, dtype)


def _without_equal_channels(array: np.ndarray) -> np.ndarray:
    """`(H, W, 3)` with three equal channels -> `(H, W)`; any other array as it is."""
    if array.ndim == 3:
        first, *others = np.moveaxis(array, 2, 0)
        # A few pixels tell most colour images, before all of them are compared.
        if all((first[::31, ::31] == other[::31, ::31]).all() and (first == other).all() for other in others):
            array = first
    return np.ascontiguousarray(array)


def _turned_over(array: np.ndarray) -> np.ndarray:
    """Dark for bright, within the bits that the values use."""
    top = 255 if array.dtype == np.uint8 else 2 ** int(array.max()).bit_length() - 1
    return top - array
