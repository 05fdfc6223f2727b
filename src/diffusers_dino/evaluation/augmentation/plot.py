"""Figures of the augmentation protocol (the paper's Fig. 4). Results are drawn, not computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..figures import add_legend, new_figure
from .cells import JUDGED, STRATEGIES, order_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .result import AugmentationResult, Configuration

__all__ = ["plot_augmentation", "plot_differences"]

_COLORS = {name: f"C{number}" for number, name in enumerate(STRATEGIES)}


def plot_augmentation(result: AugmentationResult) -> Figure:
    """Macro AUROC against the ratio of synthetic to real images: a row for each mode, a column for each regime.

    Points are means over folds with their standard deviation; the line and band are the real-only baseline.
    Configurations that are not finished are left out.
    """
    rows = [row for row in result.configurations if row.mean is not None]
    if not rows:
        raise ValueError("No configuration of the grid has all its folds, so there is nothing to draw.")
    regimes = list(dict.fromkeys(row.regime for row in rows))
    modes = sorted({row.mode for row in rows if not row.is_baseline}) or [""]
    ratios = sorted({row.ratio for row in rows if not row.is_baseline})
    figure = new_figure(1.2 + 2.6 * len(regimes), 0.6 + 2.5 * len(modes))
    panels = figure.subplots(len(modes), len(regimes), squeeze=False, sharex=True, sharey=True)
    for mode, line in zip(modes, panels, strict=True):
        for regime, axes in zip(regimes, line, strict=True):
            members = [row for row in rows if row.regime == regime and (row.is_baseline or row.mode == mode)]
            _draw_panel(axes, members, ratios)
        line[0].set_ylabel(f"{mode}\nmacro AUROC".strip())
    for regime, top, bottom in zip(regimes, panels[0], panels[-1], strict=True):
        top.set_title(f"{regime} real images")
        bottom.set_xlabel("synthetic images per real one")
    add_legend(figure, panels.flatten())
    figure.tight_layout()
    return figure


def plot_differences(result: AugmentationResult) -> Figure:
    """Difference of each configuration to the real-only baseline, with its 95 % intervals.

    The thin line is the corrected interval over folds, as in the table; the thick one is the bootstrap interval over
    patients. A filled point is significant at 5 % after correction.
    """
    rows = [row for row in result.configurations if row.difference is not None]
    if not rows:
        raise ValueError("No configuration has all its folds and those of its baseline, so there is no difference.")
    figure = new_figure(8, 1.2 + 0.26 * len(rows))
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=0.8)
    names = []
    for place, row in enumerate(rows):
        d, color = row.difference, _COLORS[row.strategy.removesuffix(JUDGED)]
        axes.plot([d.low, d.high], [place, place], color=color, linewidth=1)
        axes.plot([d.patients_low, d.patients_high], [place, place], color=color, linewidth=4, alpha=0.5)
        face = color if d.corrected_p < 0.05 else "white"
        axes.plot([d.mean], [place], marker="o", color=color, markerfacecolor=face)
        names.append(f"{row.regime}, 1:{row.ratio}, {row.mode}, {row.strategy}")
        if place and rows[place - 1].regime != row.regime:
            axes.axhline(place - 0.5, color="grey", linewidth=0.5)
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(
        "macro AUROC minus that of only real images\nthin: 95 % over folds, corrected; thick: over patients"
    )
    axes.grid(alpha=0.3, axis="x")
    figure.tight_layout()
    return figure


def _draw_panel(axes: Axes, rows: list[Configuration], ratios: list[int]) -> None:
    strategies = sorted({row.strategy for row in rows if not row.is_baseline}, key=order_of)
    for row in rows:
        if row.is_baseline:
            axes.axhline(row.mean, color="black", linestyle="--", linewidth=1, label="real only")
            if row.sd is not None:
                axes.axhspan(row.mean - row.sd, row.mean + row.sd, color="black", alpha=0.08, linewidth=0)
    for number, strategy in enumerate(strategies):
        own = sorted((row for row in rows if row.strategy == strategy), key=lambda row: row.ratio)
        # ratios stand side by side as categories: 1:1 and 1:50 would not fit on one axis
        places = [
            ratios.index(row.ratio) + 0.3 / max(2.5, len(strategies)) * (number - (len(strategies) - 1) / 2)
            for row in own
        ]
        means, spread = [row.mean for row in own], [row.sd or 0.0 for row in own]
        style = {"color": _COLORS[strategy.removesuffix(JUDGED)], "label": strategy, "capsize": 3}
        judged = {"marker": "s", "linestyle": ":", "markerfacecolor": "white"} if strategy.endswith(JUDGED) else {}
        axes.errorbar(places, means, yerr=spread, **({"marker": "o", **style} | judged))
    axes.set_xticks(range(len(ratios)), [f"1:{ratio}" for ratio in ratios])
    axes.grid(alpha=0.3)
