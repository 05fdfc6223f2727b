"""The size that a compressed frame gives itself, known before it is decoded."""

from __future__ import annotations

__all__ = ["frame_header"]


def frame_header(frame: bytes) -> tuple[int, int, int] | None:
    """Rows, columns and components that a JPEG, JPEG-LS or JPEG 2000 codestream says it has; None if it says nothing.

    Sources: ITU-T T.81 B.2.2, T.87 C.2.2 (JPEG-LS has the same frame header), T.800 A.5.1.
    """
    start = frame.find(b"\xff\x4f\xff\x51")  # JPEG 2000: start of codestream, then size
    if start >= 0 and (start == 0 or frame.startswith(b"\x00\x00\x00\x0cjP")):
        return _jpeg_2000_header(frame[start + 4 :])
    return _jpeg_header(frame) if frame.startswith(b"\xff\xd8") else None


def _jpeg_2000_header(size: bytes) -> tuple[int, int, int] | None:
    if len(size) < 39:
        return None
    columns, rows, left, top = (int.from_bytes(size[i : i + 4], "big") for i in (4, 8, 12, 16))
    return rows - top, columns - left, int.from_bytes(size[36:38], "big")


def _jpeg_header(frame: bytes) -> tuple[int, int, int] | None:
    place = 2
    while place + 10 <= len(frame) and frame[place] == 0xFF:
        marker = frame[place + 1]
        if marker == 0xFF:  # fill bytes before a marker
            place += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns = (int.from_bytes(frame[place + i : place + i + 2], "big") for i in (5, 7))
            return rows, columns, frame[place + 9]
        place += 2 + int.from_bytes(frame[place + 2 : place + 4], "big")
    return None
