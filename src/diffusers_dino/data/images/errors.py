"""The error of all readers of images, and the check of an image's size."""

from __future__ import annotations

__all__ = ["MAX_PIXELS", "NoImageError", "UnreadableImageError", "check_size"]

# A digitised film of 35 x 43 cm at 50 lines a mm has 60 million pixels, more than any detector.
MAX_PIXELS = 100_000_000


class UnreadableImageError(ValueError):
    """A file that is damaged, or not an image of a supported kind. The message names it and the reason."""


class NoImageError(UnreadableImageError):
    """A sound DICOM file of another kind, such as a report: it does not count as damaged."""


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse an image without pixels, or with more than are allowed; raises `UnreadableImageError`."""
    if width < 1 or height < 1:
        raise UnreadableImageError(f"it has no pixels: {width} x {height}")
    if width * height > max_pixels:
        raise UnreadableImageError(
            f"its header says {width} x {height} pixels, more than {max_pixels}: it may be a decompression bomb. "
            "Raise max_pixels to read it"
        )
