"""Large images in bands of rows: what is calculated for each pixel then takes little memory besides the image."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import PIL.Image

__all__ = ["bands", "map_bands", "pixels_of"]

_VALUES = 2**18


def bands(height: int, row: int) -> Iterator[slice]:
    """Rows of an image, about a quarter of a million values at a time; `row` is how many a row has."""
    step = max(1, _VALUES // max(row, 1))
    return (slice(top, min(top + step, height)) for top in range(0, height, step))


def map_bands(
    function: Callable[[np.ndarray], np.ndarray], image: np.ndarray, dtype: np.typing.DTypeLike
) -> np.ndarray:
    """What a function of single values makes of an image, as an array of `dtype` and of the image's shape."""
    result = np.empty(image.shape, dtype)
    for rows in bands(len(image), image[0].size):
        result[rows] = function(image[rows])
    return result


def pixels_of(
    image: PIL.Image.Image, convert: Callable[[PIL.Image.Image], PIL.Image.Image] = lambda part: part
) -> np.ndarray:
    """The pixels of an image that is converted in bands: Pillow copies what it hands over, several times."""
    parts = bands(image.height, image.width)
    first = next(parts, slice(0, 0))
    if first.stop == image.height:
        return np.array(convert(image))
    array = np.asarray(convert(image.crop((0, 0, image.width, first.stop))))
    result = np.empty((image.height, *array.shape[1:]), array.dtype)
    result[first] = array
    for rows in parts:
        result[rows] = np.asarray(convert(image.crop((0, rows.start, image.width, rows.stop))))
    return result
