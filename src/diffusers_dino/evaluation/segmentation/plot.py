"""Figures of the segmentation protocol (the paper's Figs 5 and 9-12). Results are drawn, not computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .. import SegmentationResult, SweepScores

__all__ = ["SWEEP_AXES", "plot_segmentation_examples", "plot_segmentation_sweep"]

SWEEP_AXES = ("checkpoint", "layers", "timestep", "threshold")
_CONTOUR = {"reference": "tab:green", "prediction": "tab:red"}


def plot_segmentation_sweep(result: SegmentationResult, axis: str) -> Figure:
    """Dice coefficient against one axis of the sweep: mean, median and quartiles over images, one panel a model.

    At each value the other axes are where the mean is best, so a curve shows what the axis alone can cost.

    Args:
        result: Of one data set.
        axis: One of `SWEEP_AXES`.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no such axis, or no model.
    """
    if axis not in SWEEP_AXES:
        raise ValueError(f"An axis is one of {', '.join(SWEEP_AXES)}, not {axis!r}.")
    if not result.sweeps:
        raise ValueError("The result holds no sweep.")
    figure = new_figure(4 * len(result.sweeps), 3.2)
    panels = figure.subplots(1, len(result.sweeps), squeeze=False, sharey=True)[0]
    for axes, sweep in zip(panels, result.sweeps, strict=True):
        values, rows = _best_along(sweep, axis)
        lower, median, upper = np.quantile(rows, [0.25, 0.5, 0.75], axis=1)
        places = values if all(isinstance(value, (int, float)) for value in values) else range(len(values))
        axes.fill_between(places, lower, upper, alpha=0.2, label="quartiles")
        axes.plot(places, rows.mean(axis=1), marker="o", label="mean")
        axes.plot(places, median, linestyle="--", label="median")
        if places is not values:
            axes.set_xticks(list(places), [str(value) for value in values], rotation=30, ha="right")
        axes.set(title=sweep.method, xlabel=axis, ylim=(0, 1))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"Dice, best pair, {result.dataset}")
    panels[0].legend()
    return figure


def plot_segmentation_examples(
    images: Sequence[Tensor], references: Sequence[Tensor], predictions: Sequence[Tensor], titles: Sequence[str]
) -> Figure:
    """Images with the outlines of reference (green) and prediction (red).

    Args:
        images: N of `(H, W)`, any range.
        references: N masks `(H, W)` bool.
        predictions: N masks `(H, W)` bool.
        titles: Of each, such as its Dice coefficient.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is nothing to draw, or the numbers differ.
    """
    if not titles or not len(images) == len(references) == len(predictions) == len(titles):
        raise ValueError(
            f"Expected as many images, references, predictions and titles, at least one, got {len(images)}, "
            f"{len(references)}, {len(predictions)} and {len(titles)}."
        )
    columns = min(6, len(titles))
    rows = -(-len(titles) // columns)
    figure = new_figure(2.2 * columns, 2.5 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.axis("off")
    for axes, image, reference, prediction, title in zip(
        panels, images, references, predictions, titles, strict=False
    ):
        axes.imshow(image.numpy(), cmap="gray")
        for mask, color in ((reference, _CONTOUR["reference"]), (prediction, _CONTOUR["prediction"])):
            if mask.any() and not mask.all():  # a constant has no outline
                axes.contour(mask.numpy().astype(float), levels=[0.5], colors=[color], linewidths=1)
        axes.set_title(title, fontsize=8)
    figure.tight_layout()
    return figure


def _best_along(sweep: SweepScores, axis: str) -> tuple[list[Any], np.ndarray]:
    """The values of an axis, in order, and the scores `(values, N)` of the best setting at each."""
    values = list(dict.fromkeys(getattr(setting, axis) for setting in sweep.settings))
    if axis in ("timestep", "threshold"):
        values.sort()
    scores = np.array(sweep.dice)  # (H, N)
    best = []
    for value in values:
        members = [i for i, setting in enumerate(sweep.settings) if getattr(setting, axis) == value]
        best.append(scores[max(members, key=lambda i: scores[i].mean())])
    return values, np.stack(best)
