"""From the stored values of a DICOM grayscale to brightness, as one lookup table of at most 2^16 values.

Source: DICOM PS3.3 C.11.1 (modality LUT, rescale), C.11.2 (windows, VOI LUT), C.7.6.3 (stored values, polarity) and
C.7.5.1.1.2 (padding).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["Grayscale", "LookupTable", "StoredBits", "Window", "brightness_table"]


class StoredBits(NamedTuple):
    """Where in a cell of `allocated` (8 or 16) bits the value lies; `signed` values are in two's complement."""

    allocated: int
    stored: int
    high_bit: int
    signed: bool

    def values(self) -> np.ndarray:
        """The value `(2^allocated,)` that each content of a cell stands for; bits beside the value are ignored."""
        cells = np.arange(2**self.allocated)
        values = (cells >> (self.high_bit + 1 - self.stored)) & (2**self.stored - 1)
        return np.where(values >= 2 ** (self.stored - 1), values - 2**self.stored, values) if self.signed else values


@dataclass(frozen=True)
class LookupTable:
    """A modality LUT or VOI LUT: `entries` `(N,)` in 0..2^bits - 1 for the values from `first` on.

    Smaller values take the first entry, larger ones the last.
    """

    first: int
    bits: int
    entries: np.ndarray

    @property
    def span(self) -> tuple[float, float]:
        """The values that the table tells apart."""
        return self.first, self.first + len(self.entries) - 1

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """The entries of `values`."""
        index = np.clip(np.round(values).astype(np.int64) - self.first, 0, len(self.entries) - 1)
        return self.entries[index].astype(np.float64)


@dataclass(frozen=True)
class Window:
    """A window of brightness, in values after the modality transformation (C.11.2.1.2 and C.11.2.1.3).

    The width is at least 1 for the function `"LINEAR"`, above 0 for `"LINEAR_EXACT"` and `"SIGMOID"`.
    """

    center: float
    width: float
    function: str = "LINEAR"

    @property
    def span(self) -> tuple[float, float]:
        """The values that the window tells apart; outside, a sigmoid is within 2 % of its ends."""
        if self.function == "LINEAR":
            return self.center - self.width / 2, self.center + self.width / 2 - 1
        half = self.width if self.function == "SIGMOID" else self.width / 2
        return self.center - half, self.center + half

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Brightness in [0, 1]."""
        if self.function == "SIGMOID":
            return 1 / (1 + np.exp(np.clip(-4 * (values - self.center) / self.width, -500, 500)))
        low, high = self.span
        if high <= low:  # a linear window of width 1 is a threshold
            return (values > low).astype(np.float64)
        return ((values - low) / (high - low)).clip(0, 1)


@dataclass(frozen=True)
class Grayscale:
    """How the stored values of an image become brightness.

    `inverted`: large values are dark (MONOCHROME1). A `modality` LUT takes the place of slope and intercept. `padding`
    is the first and the last stored value that stand for "no image here".
    """

    bits: StoredBits
    inverted: bool = False
    slope: float = 1.0
    intercept: float = 0.0
    modality: LookupTable | None = None
    view: Window | LookupTable | None = None
    padding: tuple[int, int] | None = None


def brightness_table(gray: Grayscale, counts: np.ndarray) -> np.ndarray:
    """Brightness `(2^allocated,)` of each content of a cell, dark being 0: uint8 or, above 8 bits, uint16.

    Without a view nothing is rounded: an image of 12 bits has values in 0..4095. A view fills uint16, or uint8 for an
    image of at most 8 bits. A view that would clip more than half of the image is of another image, and is ignored.
    Padding becomes as dark as the darkest pixel beside it. `counts`: how many pixels have each content.
    """
    stored = gray.bits.values()
    padding = _padding(gray.padding, stored, counts)
    used = (counts > 0) & ~padding
    if gray.modality:
        values, bits = gray.modality(stored), gray.modality.bits
        unit = values / (2**bits - 1)
    else:
        values, bits = gray.slope * stored + gray.intercept, gray.bits.stored
        unit = (stored - stored.min()) / (2**bits - 1)
        unit = 1 - unit if gray.slope < 0 else unit
    top = 255 if bits <= 8 else 2**bits - 1
    if gray.view:
        low, high = gray.view.span
        shown = counts[used & (values >= low) & (values <= high)].sum()
        if shown * 2 >= counts[used].sum():
            unit, top = gray.view(values), 255 if bits <= 8 else 65535
            unit = unit / (2**gray.view.bits - 1) if isinstance(gray.view, LookupTable) else unit
    unit = 1 - unit if gray.inverted else unit
    table = np.round(unit.clip(0, 1) * top).astype(np.uint8 if top == 255 else np.uint16)
    if padding.any():
        table[padding] = table[used].min()
    return table


def _padding(limits: tuple[int, int] | None, stored: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which contents are padding: none of them if the image is nothing but padding."""
    none = np.zeros(len(stored), bool)
    if limits is None:
        return none
    padding = (stored >= min(limits)) & (stored <= max(limits))
    return padding if counts[~padding].any() else none
