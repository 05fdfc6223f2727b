"""The figure of the fidelity protocol (the paper's Fig. 3). Results are drawn, not computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .result import FidelityResult

__all__ = ["plot_fidelity"]

_PANELS = {"frechet": "Fréchet distance", "kernel": "kernel distance", "coverage": "coverage"}


def plot_fidelity(result: FidelityResult) -> Figure:
    """Distances and coverage against the updates of the checkpoints, with intervals; controls are horizontal lines.

    ValueError if there is no checkpoint.
    """
    rows = result.checkpoints
    if not rows:
        raise ValueError("The result holds no checkpoint to draw.")
    controls = [row for row in result.rows if row.step is None]
    figure = new_figure(4.2 * len(_PANELS), 3.4)
    for axes, (name, title) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
        estimates = [getattr(row, name) for row in rows]
        steps = [row.step for row in rows]
        axes.fill_between(steps, [e.low for e in estimates], [e.high for e in estimates], alpha=0.2)
        axes.plot(steps, [e.value for e in estimates], marker="o", label="checkpoints")
        for number, row in enumerate(controls, 1):
            estimate = getattr(row, name)
            axes.axhspan(estimate.low, estimate.high, alpha=0.1, color=f"C{number}")
            axes.axhline(estimate.value, linestyle="--", color=f"C{number}", label=row.images)
        spec = rows[0].features
        axes.set(title=f"{title}, {spec.extractor}", xlabel="updates")
        if name == "frechet":
            axes.set(yscale="log", ylabel=f"{rows[0].num_images} against {rows[0].num_reference} images")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    return figure
