"""Figures of the segmentation protocol (the paper's Figs 5 and 9-12). Results are drawn, not computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ...data.sources.masks import MaskedImages
from ...pixels import with_channels
from ..figures import new_figure
from .protocol import SegmentationResult, SegmentationStudy, SweepScores, chosen_masks, file_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SWEEP_AXES", "draw_segmentation", "plot_segmentation_examples", "plot_segmentation_sweep"]

SWEEP_AXES = ("checkpoint", "layers", "timestep", "threshold")


def draw_segmentation(
    study: SegmentationStudy, images: MaskedImages, folder: str | Path, num_examples: int = 6
) -> None:
    """Write curves over each axis that was swept, and each model's best and worst images, as PNGs.

    `num_examples` is the number of best and of worst images; 0 draws no patient.
    """

    def save(figure: Figure, name: str) -> None:
        figure.savefig(Path(folder) / f"{name}.png", dpi=120, bbox_inches="tight")

    for axis in SWEEP_AXES:
        if any(len({getattr(s, axis) for s in sweep.settings}) > 1 for sweep in study.result.sweeps):
            save(plot_segmentation_sweep(study.result, axis), axis)
    if not num_examples:
        return
    images = images.select(study.result.keys)
    for scores in study.result.methods:
        if scores.method not in study.swept:
            continue
        order = sorted(range(len(images)), key=lambda i: scores.dice[i])
        for kind, chosen in (("failures", order[:num_examples]), ("examples", order[-num_examples:])):
            figure = plot_segmentation_examples(
                [with_channels(images.image(i), 1)[0] for i in chosen],
                [images.mask(i) for i in chosen],
                chosen_masks(study, scores, images, chosen),
                [f"Dice {scores.dice[i]:.2f}" for i in chosen],
            )
            save(figure, f"{kind}-{file_name(scores.method)}-{file_name(scores.selection)}")


def plot_segmentation_sweep(result: SegmentationResult, axis: str) -> Figure:
    """Dice coefficient against one axis of the sweep: mean, median and quartiles over images, one panel a model.

    `axis` is one of `SWEEP_AXES`. At each value the other axes are where the mean is best, so a curve shows what this
    axis can cost.
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
    """Images `(H, W)` of any range with the outlines of their masks `(H, W)` bool: reference green, prediction red."""
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
        for mask, color in ((reference, "tab:green"), (prediction, "tab:red")):
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
