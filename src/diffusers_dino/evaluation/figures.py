"""Where figures of matplotlib come from, and the one of a training loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["add_legend", "new_figure", "plot_loss"]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, outside of pyplot's state. ImportError if matplotlib is missing."""
    return require("matplotlib.figure", "eval", "Figures need matplotlib").Figure(figsize=(width, height))


def add_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend below the figure of all that its panels show; a panel may lack what another one has."""
    named = {}
    for axes in panels:
        handles, names = axes.get_legend_handles_labels()
        named |= dict(zip(names, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="upper center", ncols=len(named), bbox_to_anchor=(0.5, 0.0))


def plot_loss(steps: Sequence[int], losses: Sequence[float], window: int = 50) -> Figure:
    """Training loss against the optimizer step, with its moving average over `window` steps."""
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
