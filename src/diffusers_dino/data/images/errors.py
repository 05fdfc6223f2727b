"""The error of all readers of images, and the check of an image's size."""

from __future__ import annotations

__all__ = ["MAX_PIXELS", "NoImageError", "UnreadableImageError", "check_size"]

# A digitised film of 35 x 43 cm at 50 lines a mm has 60 million pixels, more than any detector.
MAX_PIXELS = 100_000_000


class UnreadableImageError(ValueError):
    """A file that is damaged, or not an image of a supported kind. The message names it and the reason."""


class NoImageError(UnreadableImageError):
    """A sound DICOM file of another kind, such as a report: it does not count as damaged."""


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS, bytes_per_pixel: int = 1) -> None:
    """Refuse an image without pixels, with too many of them, or with more than four bytes for each allowed one."""
    if width < 1 or height < 1:
        raise UnreadableImageError(f"it has no pixels: {width} x {height}")
    most_bytes = max(4 * max_pixels, 2**24)
    if width * height > max_pixels or width * height * bytes_per_pixel > most_bytes:
        most = f"{max_pixels}" if width * height > max_pixels else f"{most_bytes // bytes_per_pixel} of its kind"
        raise UnreadableImageError(
            f"its header says {width} x {height} pixels, more than {most}: it may be a decompression bomb. "
            "Raise max_pixels to read it"
        )
