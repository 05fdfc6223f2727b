"""Figure of the label-preservation report. Results are drawn, not computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..figures import add_legend, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .result import Agreement, LabelPreservationResult

__all__ = ["plot_label_preservation"]


def plot_label_preservation(result: LabelPreservationResult) -> Figure:
    """AUROC of the given labels: a panel by label for each set, and one by how near an interpolation is to a source.

    Points are synthetic images, squares their sources, with 95 % intervals over patients; grey is what shuffled labels
    reach.
    """
    if not result.parts:
        raise ValueError("The report has no set, so there is nothing to draw.")
    wholes = result.wholes
    binned = {one.name: [p for p in result.parts if p.name == one.name and p.near is not None] for one in wholes}
    binned = {name: parts for name, parts in binned.items() if parts}
    figure = new_figure(0.8 + 3.4 * (len(wholes) + len(binned)), 3.8)
    panels = figure.subplots(1, len(wholes) + len(binned), squeeze=False, sharey=True)[0]
    for axes, whole in zip(panels, wholes, strict=False):
        rows = [whole.macro, *whole.labels]
        _draw(axes, rows, [row.label for row in rows])
        ratio = f", 1:{whole.ratio:g}" if whole.ratio else ", no source"
        axes.set_title(f"{whole.name}{ratio} (N = {whole.num_images})", fontsize="medium")
    for axes, (name, parts) in zip(panels[len(wholes) :], binned.items(), strict=True):
        _draw(axes, [part.macro for part in parts], [f"{part.near:g} to {part.far:g}" for part in parts])
        axes.set_title(f"{name}: macro, by the fraction", fontsize="medium")
        axes.set_xlabel("|fraction - 0.5|: from the middle to a source")
    panels[0].set_ylabel("AUROC of the given labels")
    add_legend(figure, panels)
    figure.tight_layout()
    return figure


def _draw(axes: Axes, rows: Sequence[Agreement], names: Sequence[str]) -> None:
    for kind, marker, color, shift in (("synthetic", "o", "C0", -0.12), ("sources", "s", "C2", 0.12)):
        places, values, low, high = [], [], [], []
        for place, row in enumerate(rows):
            value, *ends = row.bounded(kind)
            if value is None:
                continue
            places.append(place + shift)
            values.append(value)
            low.append(0 if ends[0] is None else max(0, value - ends[0]))
            high.append(0 if ends[1] is None else max(0, ends[1] - value))
        if not places and kind == "sources":  # of a prior's images
            continue
        axes.errorbar(places, values, yerr=[low, high], fmt=marker, color=color, capsize=2, label=kind)
    shuffled = {place: row for place, row in enumerate(rows) if row.shuffled_low is not None}
    heights = [row.shuffled_high - row.shuffled_low for row in shuffled.values()]
    bottoms = [row.shuffled_low for row in shuffled.values()]
    axes.bar(list(shuffled), heights, 0.7, bottoms, color="grey", alpha=0.3, linewidth=0, label="shuffled labels")
    axes.use_sticky_edges = False  # bars would end the axis at their feet
    axes.axhline(0.5, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize="small")
    axes.grid(alpha=0.3, axis="y")
