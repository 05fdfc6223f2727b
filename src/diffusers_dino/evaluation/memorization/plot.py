"""Figures of the memorization protocol. Results are drawn, not computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ...data import ImageDataset
from ...sheets import contact_sheet
from ..figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .protocol import MemorizationResult
    from .tokens import TokenCopies

__all__ = ["draw_closest_pairs", "plot_memorization"]

_SETS = {"training": "training, to other groups", "held_out": "held out", "synthetic": "synthetic"}


def plot_memorization(result: MemorizationResult) -> Figure:
    """How near synthetic images are to training images, and how near real ones are; and likewise their tokens."""
    parts = {"image": result} if result.tokens is None else {"image": result, "tokens": result.tokens}
    figure = new_figure(8, 3.2 * len(parts))
    for axes, (what, part) in zip(figure.subplots(len(parts), squeeze=False)[:, 0], parts.items(), strict=True):
        _draw_distances(axes, part, what)
    return figure


def _draw_distances(axes: Axes, part: MemorizationResult | TokenCopies, what: str) -> None:
    for number, (name, label) in enumerate(_SETS.items()):
        if (of_set := getattr(part, name)) is None:
            continue
        counts = np.array(of_set.histogram)
        edges = np.linspace(0, 1, len(counts) + 1)
        axes.stairs(
            counts / counts.sum(), edges, label=f"{label} (N = {of_set.num_images})", color=f"C{number}", linewidth=1.5
        )
    axes.axvline(part.threshold, color="black", linestyle="--", linewidth=1, label="threshold: copies to the left")
    axes.set(xlabel=f"relative distance to the nearest training {what}", ylabel="share of the images", xlim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def draw_closest_pairs(
    result: MemorizationResult,
    synthetic: ImageDataset | Tensor,
    training: ImageDataset | Tensor,
    columns: int = 3,
) -> PIL.Image.Image:
    """The closest pairs, nearest first: a synthetic image, and its nearest training image as it was compared.

    A training image is mirrored if the mirror image is what the synthetic one is near to. Images are those that
    `evaluate_memorization` was given, and `columns` the pairs in a row.
    """
    if not result.closest:
        raise ValueError("The result holds no pair to draw: it is of no synthetic images, or num_pairs is 0.")
    columns = min(columns, len(result.closest))
    pairs = result.closest[: len(result.closest) // columns * columns]
    groups = []
    for column in range(columns):
        own = pairs[column::columns]
        groups.append([_image(synthetic, pair.key) for pair in own])
        groups.append([_image(training, pair.training_key, pair.mirrored) for pair in own])
    return contact_sheet(*groups)


def _image(images: ImageDataset | Tensor, key: str, mirrored: bool = False) -> Tensor:
    """`(C, H, W)`; images of a tensor have their numbers as keys."""
    image = images[int(key)] if isinstance(images, Tensor) else images.select([key])[0]["image"]
    return torch.flip(image, [-1]) if mirrored else image
