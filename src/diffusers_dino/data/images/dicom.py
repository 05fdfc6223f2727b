"""Radiographs in DICOM files: the pixels, as a display shows them.

Rows and columns stay as they are stored: viewers show them so, and masks and boxes of data sets refer to them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ...bands import bands, map_bands
from ...extras import require
from .codestreams import frame_header
from .dicom_header import PixelField, decimals, dicom_facts, integers, items, parse_dicom, text
from .errors import MAX_PIXELS, NoImageError, UnreadableImageError, check_size
from .grayscale import Grayscale, LookupTable, StoredBits, Window, brightness_table

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.pixels.decoders.base import Decoder

__all__ = ["read_dicom"]

logger = logging.getLogger(__name__)

_SAMPLES, _PHOTOMETRIC, _PLANAR, _FRAMES, _ROWS, _COLUMNS = (0x00280000 + i for i in (2, 4, 6, 8, 0x10, 0x11))
_ALLOCATED, _STORED, _HIGH_BIT, _SIGNED, _PADDING, _PADDING_LIMIT = (0x00280100 + i for i in (0, 1, 2, 3, 0x20, 0x21))
_CENTER, _WIDTH, _INTERCEPT, _SLOPE, _FUNCTION = (0x00281050 + i for i in (0, 1, 2, 3, 6))
_MODALITY_LUTS, _VOI_LUTS, _LUT_DESCRIPTOR, _LUT_DATA = 0x00283000, 0x00283010, 0x00283002, 0x00283006
_PALETTES = [(0x00281101 + i, 0x00281201 + i) for i in range(3)]
_CLASS = 0x00080016
_TAGS = [
    *(_SAMPLES, _PHOTOMETRIC, _PLANAR, _FRAMES, _ROWS, _COLUMNS),
    *(_ALLOCATED, _STORED, _HIGH_BIT, _SIGNED, _PADDING, _PADDING_LIMIT),
    *(_CENTER, _WIDTH, _INTERCEPT, _SLOPE, _FUNCTION, _MODALITY_LUTS, _VOI_LUTS),
    *(tag for pair in _PALETTES for tag in pair),
]
_GRAYS = ("MONOCHROME1", "MONOCHROME2")
_COLORS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_KINDS = (*_GRAYS, "PALETTE COLOR", *_COLORS)
_RADIOGRAPHS = ("CR", "DR", "DX", "RG")
_WHITE = 0.8

_IMPLICIT, _JPEG_BASELINE, _RLE = "1.2.840.10008.1.2", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.5"
# How JPEG, JPEG-LS and JPEG 2000 (bare, and in a file of its own) begin.
_CODESTREAMS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP")
# Pillow's libjpeg is the fastest; pylibjpeg-rle ends the process on damaged runs, where pydicom's own raises an error.
_DECODERS = {_JPEG_BASELINE: "pillow", _RLE: "pydicom"}


@dataclass(frozen=True)
class _Layout:
    """How the pixels lie in the file."""

    syntax: str
    rows: int
    columns: int
    samples: int
    planar: int
    photometric: str
    bits: StoredBits


def read_dicom(
    data: bytes,
    name: str = "a DICOM file",
    *,
    view: bool = True,
    inverted: bool | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Read the single image of a DICOM file.

    Grayscale goes through the modality LUT or rescale slope and intercept, then through the first VOI LUT or window,
    and MONOCHROME1 is inverted within its own bits, so that air is dark: see `grayscale.brightness_table`. Colour
    comes back as RGB.

    A radiograph that says MONOCHROME1 but is not inverted (all four corners would turn white around a dark center) is
    left as it is, with a warning: tools that invert pixels often keep the tag.

    Args:
        data: The bytes of the file.
        name: What to call it in a warning.
        view: Whether to apply the header's VOI LUT or window.
        inverted, max_pixels: See `read_image`.

    Returns:
        `(H, W)` uint8 or, above 8 bits, uint16; for colour `(H, W, 3)` uint8.

    Raises:
        NoImageError: If the file is of a kind without pixels, such as a report or a presentation state.
        UnreadableImageError: If it is damaged, too large, holds several images or none, or is of an unsupported kind.
            The message quotes nothing of the header.
    """
    syntax, dataset, pixels = parse_dicom(data, _TAGS, 6 * max_pixels + 2**26, pixels=True)
    if pixels is None:
        _explain_lack_of_pixels(dataset)
    layout = _layout(dataset, syntax)
    check_size(layout.columns, layout.rows, max_pixels, layout.samples * layout.bits.allocated // 8)
    cells = _decode(pixels, layout)
    if layout.photometric == "PALETTE COLOR":
        return _palette_color(dataset, layout, cells)
    if layout.samples == 3:
        return (cells >> max(layout.bits.stored - 8, 0)).astype(np.uint8)
    counts = np.zeros(2**layout.bits.allocated, np.int64)
    for rows in bands(layout.rows, layout.columns):
        counts += np.bincount(cells[rows].ravel(), minlength=len(counts))
    gray = _grayscale(dataset, layout, view, inverted)
    image = _look_up(brightness_table(gray, counts), cells)
    radiograph = dicom_facts(dataset).get("modality") in _RADIOGRAPHS
    if gray.inverted and inverted is None and radiograph and _surrounds_dark_with_white(image):
        logger.warning("%s says MONOCHROME1, but its air is dark as it is stored: it is not inverted", name)
        image = _look_up(brightness_table(replace(gray, inverted=False), counts), cells)
    return image


def _look_up(table: np.ndarray, cells: np.ndarray) -> np.ndarray:
    return map_bands(lambda some: table[some], cells, table.dtype)


def _layout(dataset: Dataset, syntax: str) -> _Layout:
    frames = decimals(dataset, _FRAMES) if text(dataset, _FRAMES) else [1.0]
    if frames != [1.0]:
        raise UnreadableImageError("it holds several images or an invalid number of them. Export the one to read")
    photometric = next((known for known in _KINDS if known == text(dataset, _PHOTOMETRIC)), None)
    if photometric is None:
        raise UnreadableImageError(f"its photometric interpretation is none of {', '.join(_KINDS)}")
    allocated = _integer(dataset, _ALLOCATED, "bits allocated")
    stored = _integer(dataset, _STORED, "bits stored", allocated)
    high_bit = _integer(dataset, _HIGH_BIT, "high bit", stored - 1)
    signed = _integer(dataset, _SIGNED, "pixel representation", 0)
    layout = _Layout(
        syntax=syntax,
        rows=_integer(dataset, _ROWS, "rows"),
        columns=_integer(dataset, _COLUMNS, "columns"),
        samples=_integer(dataset, _SAMPLES, "samples per pixel", 1),
        planar=_integer(dataset, _PLANAR, "planar configuration", 0),
        photometric=photometric,
        bits=StoredBits(allocated, stored, high_bit, signed == 1),
    )
    if allocated not in (8, 16) or not 1 <= stored <= high_bit + 1 <= allocated:
        raise UnreadableImageError(f"it stores {stored} bits up to bit {high_bit} in {allocated}; 8 and 16 are read")
    if layout.samples != (3 if photometric in _COLORS else 1) or signed not in (0, 1):
        raise UnreadableImageError(f"{layout.samples} samples a pixel do not make {photometric}")
    return layout


def _integer(dataset: Dataset, tag: int, what: str, default: int | None = None) -> int:
    values = integers(dataset, tag)
    if values:
        return values[0]
    if default is None:
        raise UnreadableImageError(f"it does not say its {what}")
    return default


def _find_decoder(syntax: str) -> tuple[Decoder, str]:
    """pydicom's decoder of a transfer syntax, and the plugin that is to do it (none for uncompressed pixels)."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import AllTransferSyntaxes

    known = next((uid for uid in AllTransferSyntaxes if uid == (syntax or _IMPLICIT)), None)
    try:
        decoder = get_decoder(known) if known else None
    except NotImplementedError:
        decoder = None
    if decoder is None:
        kind = f"as {known.name}" if known else "in an unknown way"
        raise UnreadableImageError(f"its pixels are stored {kind}, which is not read")
    if not decoder.is_encapsulated:
        return decoder, ""
    plugin = _DECODERS.get(known, "pylibjpeg")
    if plugin not in decoder.available_plugins:
        for module in ("pylibjpeg", "libjpeg", "openjpeg"):
            require(module, "dicom", f"Decoding {known.name} needs {module}")
    return decoder, plugin


def _explain_lack_of_pixels(dataset: Dataset) -> NoReturn:
    from pydicom.uid import UID_dictionary

    kind = UID_dictionary.get(text(dataset, _CLASS), ("Image",))[0]
    if "Image" in kind:
        raise UnreadableImageError("it holds no pixels, or the file is cut short: it ends before them")
    raise NoImageError(f"it is not an image ({kind})")


def _decode(pixels: PixelField, layout: _Layout) -> np.ndarray:
    """The contents of the cells, unsigned, `(H, W)` or `(H, W, 3)` as RGB."""
    from pydicom.encaps import encapsulate

    decoder, plugin = _find_decoder(layout.syntax)
    value = _frame(pixels, layout, bool(plugin))
    if not value:
        raise UnreadableImageError("it holds no pixels")
    if plugin and not _frame_agrees(value, layout):
        raise UnreadableImageError(f"its frame is not of the size in its header, {layout.columns} x {layout.rows}")
    try:
        value = encapsulate([value]) if plugin else value
        array, _ = decoder.as_array(value, decoding_plugin=plugin, **_options(layout, pixels.type))
    except Exception:
        array = None
    if array is None:  # raised out here, so that no other exception is attached
        raise UnreadableImageError(f"its pixels are damaged or cut short ({decoder.UID.name})")
    return array.astype(array.dtype.newbyteorder("="), copy=False).view(f"u{array.itemsize}")


def _frame(pixels: PixelField, layout: _Layout, compressed: bool) -> bytes:
    """The bytes of the only frame."""
    several = "its pixels are those of several images (frames), though its header says one. Export the one to read"
    if compressed:
        starts = sum(fragment.startswith(_CODESTREAMS) for fragment in pixels.fragments)
        count = len(pixels.fragments) if layout.syntax == _RLE else max(starts, pixels.frames)
        if count > 1:
            raise UnreadableImageError(several)
        return b"".join(pixels.fragments)
    halves = 4 if layout.photometric == "YBR_FULL_422" else 2 * layout.samples  # two pixels share their colours
    expected = layout.rows * layout.columns * halves // 2 * layout.bits.allocated // 8
    if len(pixels.value) >= 2 * expected:
        raise UnreadableImageError(several)
    if len(pixels.value) - expected >= expected // layout.rows and any(pixels.value[expected:]):  # a row, not padding
        raise UnreadableImageError(f"it holds {len(pixels.value)} bytes of pixels, but its header says {expected}")
    if 0 < len(pixels.value) < expected:
        raise UnreadableImageError(f"its pixels are cut short: {len(pixels.value)} of {expected} bytes")
    return pixels.value[: expected + expected % 2]


def _options(layout: _Layout, vr: str | None) -> dict[str, Any]:
    """What pydicom's decoders need to know: only numbers and defined terms."""
    return {
        "rows": layout.rows,
        "columns": layout.columns,
        "number_of_frames": 1,
        "samples_per_pixel": layout.samples,
        "planar_configuration": layout.planar,
        "photometric_interpretation": layout.photometric,
        "bits_allocated": layout.bits.allocated,
        "bits_stored": layout.bits.stored,
        "pixel_representation": int(layout.bits.signed),
        "pixel_keyword": "PixelData",
        "pixel_vr": vr if vr in ("OB", "OW") else "OW",
        "correct_unused_bits": False,  # `StoredBits.values` does, knowing the high bit too
    }


def _frame_agrees(frame: bytes, layout: _Layout) -> bool:
    """Whether a compressed frame is as large as the header says, so that decoding it takes what was checked."""
    if layout.syntax == _RLE:  # says no size, but never grows by more than a byte in 128
        return len(frame) <= 2 * layout.rows * layout.columns * layout.samples * layout.bits.allocated // 8 + 2**16
    return frame_header(frame) == (layout.rows, layout.columns, layout.samples)


def _grayscale(dataset: Dataset, layout: _Layout, view: bool, inverted: bool | None) -> Grayscale:
    slope, intercept = decimals(dataset, _SLOPE), decimals(dataset, _INTERCEPT)
    signed = layout.bits.signed
    modality = _lookup_table(items(dataset, _MODALITY_LUTS), signed)
    padding, limit = (integers(dataset, tag, signed)[:1] for tag in (_PADDING, _PADDING_LIMIT))
    gray = Grayscale(
        layout.bits,
        inverted=layout.photometric == "MONOCHROME1" if inverted is None else inverted,
        slope=slope[0] if slope and slope[0] else 1.0,
        intercept=intercept[0] if intercept else 0.0,
        modality=modality,
        padding=(padding[0], limit[0] if limit else padding[0]) if padding else None,
    )
    if not view:
        return gray
    negative = not modality and (signed or gray.intercept < 0)
    return replace(gray, view=_lookup_table(items(dataset, _VOI_LUTS), negative) or _window(dataset))


def _lookup_table(sequence: list[Dataset], signed: bool) -> LookupTable | None:
    """The first table of a LUT sequence, if it is a whole one."""
    if not sequence:
        return None
    descriptor = integers(sequence[0], _LUT_DESCRIPTOR)
    if len(descriptor) != 3 or not 1 <= descriptor[2] <= 16:
        return None
    length, first, bits = descriptor[0] or 65536, descriptor[1], descriptor[2]
    entries = _entries(sequence[0], _LUT_DATA, length)
    if entries is None:
        return None
    bits = max(bits, int(entries.max()).bit_length())  # some files say the bits of the pixels, not of the entries
    return LookupTable(first - 65536 if signed and first > 32767 else first, bits, entries)


def _entries(dataset: Dataset, tag: int, length: int) -> np.ndarray | None:
    """The entries of a table, one or two bytes each."""
    value = dataset.get_item(tag).value if tag in dataset else None
    if isinstance(value, bytes) and len(value) in (length, length + 1) and len(value) < 2 * length:
        return np.frombuffer(value[:length], np.uint8)
    entries = integers(dataset, tag)
    return np.array(entries[:length]) if len(entries) >= length else None


def _window(dataset: Dataset) -> Window | None:
    """The first window, if it is a possible one."""
    center, width = decimals(dataset, _CENTER), decimals(dataset, _WIDTH)
    function = text(dataset, _FUNCTION)
    function = function if function in ("LINEAR_EXACT", "SIGMOID") else "LINEAR"
    if not center or not width or width[0] <= 0 or (function == "LINEAR" and width[0] < 1):
        return None
    return Window(center[0], width[0], function)


def _palette_color(dataset: Dataset, layout: _Layout, cells: np.ndarray) -> np.ndarray:
    """Indices `(H, W)` -> RGB `(H, W, 3)` uint8."""
    channels = []
    for descriptor_tag, data_tag in _PALETTES:
        descriptor = integers(dataset, descriptor_tag)
        entries = _entries(dataset, data_tag, descriptor[0] or 65536) if len(descriptor) == 3 else None
        if entries is None:
            raise UnreadableImageError("its palette is missing, cut short or segmented")
        table = LookupTable(descriptor[1], descriptor[2], entries)
        channels.append(table(layout.bits._replace(signed=False).values())[cells])
    deep = max(channel.max() for channel in channels) > 255
    return (np.stack(channels, axis=2) / (257 if deep else 1)).round().astype(np.uint8)


def _surrounds_dark_with_white(image: np.ndarray) -> bool:
    """Whether all four corners of an image `(H, W)` are near its white, and its center is in its dark half."""
    low, high = float(image.min()), float(image.max())
    height, width = (max(side // 16, 1) for side in image.shape)
    corners = [image[y, x] for y in (slice(height), slice(-height, None)) for x in (slice(width), slice(-width, None))]
    top, left = (side // 4 for side in image.shape)
    center = image[top : image.shape[0] - top, left : image.shape[1] - left]
    near_white = min(float(corner.mean()) for corner in corners) > low + _WHITE * (high - low)
    return near_white and float(center.mean()) < low + 0.5 * (high - low)
