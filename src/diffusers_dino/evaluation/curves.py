"""Results as figures. Nothing is computed here beyond what a line needs to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from .figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from . import InterpolationResult

__all__ = ["plot_loss", "plot_path"]


def plot_loss(steps: Sequence[int], losses: Sequence[float], window: int = 50) -> Figure:
    """Training loss against the step, with its moving average.

    Args:
        steps: Optimizer steps, ascending.
        losses: Loss at each of them.
        window: Number of steps that the moving average takes in.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: There is nothing to draw, or the lengths differ.
    """
    if not steps or len(steps) != len(losses):
        raise ValueError(f"Expected as many losses as steps and at least one, got {len(losses)} and {len(steps)}.")
    figure = new_figure(8, 3)
    axes = figure.subplots()
    axes.plot(steps, losses, alpha=0.3, linewidth=0.8, label="each step")
    window = min(window, len(losses))
    averages = [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
    axes.plot(steps, averages, label=f"mean of {window} steps")
    axes.set(xlabel="optimizer step", ylabel="training loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def plot_path(result: InterpolationResult) -> Figure:
    """Similarity to both ends along the paths between images, of the model and of its controls.

    Args:
        result: From `protocols.evaluate_interpolation`.

    Raises:
        ImportError: matplotlib is missing.
    """
    spaces = {"by the encoder": result.by_encoder, "by 16 x 16 pixels": result.by_pixels}
    figure = new_figure(10, 4)
    for axes, (title, space) in zip(figure.subplots(1, 2, sharey=True), spaces.items(), strict=True):
        for number, way in enumerate(fields(space)):
            curves, style = getattr(space, way.name), "-" if way.name == "generated" else "--"
            label = f"{way.name.replace('_', ' ')}: {curves.monotone_steps:.0%}"
            axes.plot(result.fractions, curves.to_source, style, marker=".", color=f"C{number}", label=label)
            axes.plot(result.fractions, curves.to_target, style, marker=".", color=f"C{number}", alpha=0.5)
        axes.set(title=title, xlabel="fraction of the path", ylabel="mean cosine to source | target (pale)")
        axes.grid(alpha=0.3)
        axes.legend(title="steps the right way", fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return figure
