"""The paper's preparation of a radiograph: dynamic range to uint8, padded borders off, centre crop 1:1, resize.

Source: DiNO-Diffusion (arXiv 2407.11594), section 2.1.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace

import numpy as np
from PIL import Image

from ...bands import map_bands
from ...pixels import central_window
from .errors import UnreadableImageError

__all__ = ["Preprocessing", "border_window", "refuse_blank", "stretch_to_uint8"]

_RESAMPLING = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Raised when the same configuration starts to give other pixels, so that old caches stop matching.
_VERSION = 1


@dataclass(frozen=True)
class Preprocessing:
    """Turns the array of any radiograph into a square of uint8.

    The order is: remove borders, map the dynamic range, crop, resize. Borders go first so that padding does not
    count as the darkest value of the image.

    Args:
        size: Side of the result in pixels.
        remove_borders: Whether to cut uniform bands (padding, collimation) off the four sides.
        border_tolerance: Largest deviation inside a band, as a fraction of the image's dynamic range, in [0, 1).
        clip_percent: Percentage of pixels clipped at each end of the dynamic range, in [0, 50). 0 maps exactly
            minimum..maximum to 0..255.
        resampling: `"box"`, `"bilinear"`, `"bicubic"` or `"lanczos"`; all are antialiased.
    """

    size: int = 512
    remove_borders: bool = True
    border_tolerance: float = 0.01
    clip_percent: float = 0.0
    resampling: str = "bicubic"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {self.size}")
        if not 0 <= self.border_tolerance < 1:
            raise ValueError(f"border_tolerance must be in [0, 1), got {self.border_tolerance}")
        if not 0 <= self.clip_percent < 50:
            raise ValueError(f"clip_percent must be in [0, 50), got {self.clip_percent}")
        for name in ("border_tolerance", "clip_percent"):  # 0 and 0.0 are one configuration, of one fingerprint
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.resampling not in _RESAMPLING:
            raise ValueError(f"resampling must be one of {', '.join(_RESAMPLING)}, got {self.resampling!r}")

    def __call__(self, image: np.ndarray, earlier: Preprocessing | None = None) -> np.ndarray:
        """Prepare an image `(H, W)` or `(H, W, 3)` of numbers, none NaN: uint8 `(size, size)` or `(size, size, 3)`.

        `earlier` is how shards say that their images were prepared: those that were prepared in this way for another
        size are only resized, and borders that were removed are not looked for again.
        """
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or 0 in image.shape:
            raise ValueError(f"Expected an image of shape (H, W) or (H, W, 3), got {image.shape}")
        is_cut = self.is_cut(image, earlier)
        if self.remove_borders and not is_cut:
            image = image[border_window(image, self.border_tolerance)]
        if not is_cut or self != replace(earlier, size=self.size, resampling=self.resampling):
            image = stretch_to_uint8(image, self.clip_percent)
        square = image[central_window(*map(slice, image.shape[:2]))]
        if square.shape[0] == self.size:
            return np.ascontiguousarray(square)
        return np.array(Image.fromarray(square).resize((self.size, self.size), _RESAMPLING[self.resampling]))

    def window(self, image: np.ndarray, earlier: Preprocessing | None = None) -> tuple[slice, slice]:
        """Rows and columns of the square that is kept of an image, which may have been prepared `earlier`."""
        if self.remove_borders and not self.is_cut(image, earlier):
            return central_window(*border_window(image, self.border_tolerance))
        return central_window(*map(slice, image.shape[:2]))

    def is_cut(self, image: np.ndarray, earlier: Preprocessing | None) -> bool:
        """Whether an image is a square that was prepared `earlier`, with no border left that this would remove."""
        if earlier is None or image.dtype != np.uint8 or image.shape[:2] != (earlier.size, earlier.size):
            return False
        return earlier.remove_borders or not self.remove_borders

    def prepare_mask(self, mask: np.ndarray, window: tuple[slice, slice]) -> np.ndarray:
        """Cut a mask `(H, W)` bool by its image's `window`, resize it without new values: bool `(size, size)`."""
        square = Image.fromarray(mask[window].astype(np.uint8))
        return np.array(square.resize((self.size, self.size), Image.Resampling.NEAREST)).astype(bool)

    def fingerprint(self) -> str:
        """A short hash that is equal for equal configurations only."""
        text = json.dumps({"version": _VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def border_window(image: np.ndarray, tolerance: float) -> tuple[slice, slice]:
    """Rows and columns that are left of an image `(H, W)` or `(H, W, 3)` without the uniform bands at its four sides.

    A band goes while all its values are within `tolerance` (a fraction of the dynamic range) of the image's outermost
    value there. A uniform image stays whole.
    """
    window = [slice(0, image.shape[0]), slice(0, image.shape[1])]
    allowed = tolerance * (float(image.max()) - float(image.min()))
    for _ in range(2):  # a frame inside a frame shows only after the outer one is gone
        before = list(window)
        for axis, reverse in ((0, False), (0, True), (1, False), (1, True)):
            inside = image[tuple(window)]
            lines = inside if axis == 0 else inside.swapaxes(0, 1)
            band = _leading_band(lines[::-1] if reverse else lines, allowed)
            if band == len(lines):
                return window[0], window[1]
            start, stop = window[axis].start, window[axis].stop
            window[axis] = slice(start, stop - band) if reverse else slice(start + band, stop)
        if window == before:
            break
    return window[0], window[1]


def _leading_band(lines: np.ndarray, allowed: float) -> int:
    """How many of the first lines differ nowhere by more than `allowed` from the first value."""
    reference = lines[0, 0].astype(np.float32)
    if np.abs(lines[0] - reference).max() > allowed:  # nearly every image ends here, at the cost of one line
        return 0
    start, count = 1, 1  # only about as many lines are looked at as the band has
    most = max(1, 2**20 // lines[0].size)
    while start < len(lines):
        block = lines[start : start + count]
        outside = (np.abs(block - reference) > allowed).reshape(len(block), -1).any(axis=1)
        if outside.any():
            return start + int(outside.argmax())
        start, count = start + count, min(2 * count, most)
    return len(lines)


def stretch_to_uint8(image: np.ndarray, clip_percent: float = 0.0) -> np.ndarray:
    """Map minimum..maximum of an image (or its percentiles) linearly to 0..255; a uniform image becomes 0."""
    if clip_percent:
        low, high = np.percentile(image, (clip_percent, 100 - clip_percent))
    else:
        low, high = image.min(), image.max()
    low, high = float(low), float(high)
    if image.dtype == np.uint8 and (low, high) == (0.0, 255.0):
        return image
    if not np.isfinite((low, high)).all():
        raise ValueError("The image holds values that are not finite")
    if high <= low:
        return np.zeros(image.shape, np.uint8)
    if image.dtype == np.uint8:  # one look-up a pixel, by the fastest there is
        table = _stretched(np.arange(256), low, high)
        return map_bands(lambda some: _translate(some, table), image, np.uint8)
    return map_bands(lambda some: _stretched(some, low, high), image, np.uint8)


def _translate(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    pixels = bytearray(np.ascontiguousarray(image)).translate(table.tobytes())
    return np.frombuffer(pixels, np.uint8).reshape(image.shape)


def _stretched(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map low..high to 0..255."""
    scaled = (values.astype(np.float32) - low) * (255 / (high - low))
    return np.round(scaled.clip(0, 255)).astype(np.uint8)


def refuse_blank(image: np.ndarray, name: str = "") -> None:
    """Refuse a prepared image that shows nothing, with `UnreadableImageError`: it is damaged as others are."""
    if (image == image[:1, :1]).all():
        raise UnreadableImageError(f"{f'Cannot read {name}: ' if name else ''}all its pixels are equal")
