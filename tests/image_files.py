"""Image files in memory: by Pillow, and with 16 bits in each of several channels, which Pillow does not write."""

import ctypes
import io
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
_M_MMAP_THRESHOLD = -3  # of malloc.h
if hasattr(ctypes.CDLL(None), "mallopt"):  # glibc would keep blocks of up to 32 MB that were freed: see `peak_of`
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**22)


def encoded(image: Image.Image | np.ndarray, kind: str = "png", **options) -> bytes:
    """The file that Pillow writes of an image or an array."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def deep_png(pixels: np.ndarray) -> bytes:
    """Encode uint16 `(H, W, C)`: C is 1 (gray), 2 (gray and alpha), 3 (RGB) or 4 (RGBA)."""
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, _COLOR_TYPES[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def deep_tiff(pixels: np.ndarray, order: str = "<", compressed: bool = False) -> bytes:
    """Encode uint16 `(H, W, 3)` in one strip, in byte order `<` or `>`, plain or by zlib."""
    height, width, channels = pixels.shape
    strip = pixels.astype(f"{order}u2").tobytes()
    strip = zlib.compress(strip) if compressed else strip
    start = 8 + 2 + 12 * 9 + 4  # after the header and the directory of nine entries
    bits = struct.pack(f"{order}3H", 16, 16, 16)
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, start), (259, 4, 1, 8 if compressed else 1)]
    entries += [(262, 4, 1, 2), (273, 4, 1, start + len(bits)), (277, 4, 1, channels), (278, 4, 1, height)]
    entries += [(279, 4, 1, len(strip))]
    directory = struct.pack(f"{order}H", 9) + b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return head + directory + bytes(4) + bits + strip


def peak_of(function: Callable[[], object]) -> int:
    """The most bytes that this process took besides what it had before.

    Pages of libraries do not count: a kernel that is short of memory drops them, and reads them again when they are
    used.
    """
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        pytest.skip("needs Linux")

    def kibibytes(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", status.read_text())[1])

    clear.write_text("5")
    before, files = kibibytes("VmRSS"), kibibytes("RssFile")
    function()
    return 1024 * (kibibytes("VmHWM") - before - max(0, kibibytes("RssFile") - files))
