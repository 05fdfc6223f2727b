"""Images that visitors drop, and examples to choose from, read and fitted to a size."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ..data import Preprocessing, open_images, read_image
from ..pixels import to_unit, unit_to_uint8

__all__ = ["DISPLAY", "SEEN", "example_images", "fitted", "fitted_size", "open_image"]

DISPLAY = 1024  # pixels: larger images are shown smaller, and kept and downloaded at their own size
SEEN = 4096  # longer side in pixels of what the model is given, which it shrinks to hundreds
MIN_SIDE = 32  # of an image in pixels: a smaller one has nothing to show
MOST_PIXELS = 2**26  # of a file
KEPT_PIXELS = 2**24  # larger images are shrunk to it; radiographs have fewer
_MAX_RATIO = 8  # of an image's sides


def open_image(path: str | Path, tell: Callable[[str], object] | None = None) -> Image.Image:
    """Read a file that somebody dropped: gray or RGB of 8 bits, from its darkest to its brightest value.

    Training stretches the range in the same way (`Preprocessing`), so the model sees what it knows. An image of more
    than `KEPT_PIXELS` is shrunk. `tell` hears of that, and of warnings. Neither they nor errors name a folder.
    """
    name = Path(path).name
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{name} is not on the server any more: drop it again.") from error
    with _warnings_to(tell or (lambda text: None)):
        pixels = read_image(content, name=name, max_pixels=MOST_PIXELS)  # (H, W) or (H, W, 3)
    if tell and _is_animated(content):
        tell(f"{name} holds several images: the first one is used.")
    height, width = pixels.shape[:2]
    if min(height, width) < MIN_SIDE or max(height, width) > _MAX_RATIO * min(height, width):
        raise ValueError(
            f"{name} has {width} x {height} pixels: the shorter side must have {MIN_SIDE} at least, the longer one at "
            f"most {_MAX_RATIO} times as many."
        )
    least, most = int(pixels.min()), int(pixels.max())
    values = to_unit(np.arange(least, most + 1, dtype=np.uint16)[None])[0][0]  # (1, V) in [0, 1]; uint16 is stretched
    image = Image.fromarray(unit_to_uint8(values[0]).numpy()[pixels - least])
    if height * width > KEPT_PIXELS:
        image = fitted(image, int(max(width, height) * math.sqrt(KEPT_PIXELS / (height * width))))
        if tell:
            tell(f"{name} has {width} x {height} pixels: it is shown and used at {image.width} x {image.height}.")
    return image


def example_images(source: str | Path, size: int, count: int) -> list[Image.Image]:
    """A few images of a folder or of shards, evenly spread, prepared as for training: `size` x `size` pixels."""
    images = open_images(source, Preprocessing(size, remove_borders=False), local_files_only=True)
    count = min(count, len(images))
    places = [place * len(images) // count for place in range(count)]
    return [Image.fromarray(array) for _, array in images.read_many(places)]


def fitted(image: Image.Image, max_side: int) -> Image.Image:
    """An image whose longer side is at most `max_side` pixels; smaller ones as they are."""
    size = fitted_size(image, max_side)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def fitted_size(image: Image.Image, max_side: int) -> tuple[int, int]:
    """Width and height that `fitted` gives an image."""
    scale = min(1, max_side / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    return width, height


@contextlib.contextmanager
def _warnings_to(tell: Callable[[str], object]) -> Iterator[None]:
    """Call `tell` with what this thread's code logs as a warning."""
    logger, thread = logging.getLogger("diffusers_dino"), threading.get_ident()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING and record.thread == thread:
                tell(record.getMessage())

    handler = Handler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _is_animated(content: bytes) -> bool:
    """Whether a file is one of several pages or frames, as far as PIL knows its format."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content)) as file:
        return getattr(file, "is_animated", False)
    return False
