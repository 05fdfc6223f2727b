"""How prepared images are stored in shards."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image

from .preprocessing import Preprocessing

__all__ = ["Encoding"]


@dataclass(frozen=True)
class Encoding:
    """How an image is prepared and stored.

    Args:
        preprocessing: How it is prepared.
        format: `"jpg"`, or `"png"`, which loses nothing and takes twice the room.
        quality: Of JPEG, in 1..100.
    """

    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    format: Literal["jpg", "png"] = "jpg"
    quality: int = 95

    def __post_init__(self) -> None:
        if self.format not in ("jpg", "png"):
            raise ValueError(f"format must be jpg or png, got {self.format!r}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be in 1..100, got {self.quality}")

    def encode(self, image: np.ndarray) -> bytes:
        """uint8 `(H, W)` or `(H, W, 3)` -> the bytes of a file, without metadata."""
        buffer = io.BytesIO()
        if self.format == "jpg":  # without chroma subsampling: colour carries findings in other modalities
            Image.fromarray(image).save(buffer, "jpeg", quality=self.quality, subsampling=0)
        else:
            Image.fromarray(image).save(buffer, "png")
        return buffer.getvalue()
