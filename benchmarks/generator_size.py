"""When does augmentation help? Gains of Table 1 over generators that differ in their images or their encoder.

    python benchmarks/generator_size.py --experiments "500 images=eval/500" "5,000=eval/5000" "12,989=eval/12989" \
        --output_dir outputs/generator_size

Each folder is one of `diffusers-dino evaluate augmentation`, of the same images, folds and classifier. p values are
corrected over all experiments together (Holm).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from diffusers_dino.cli.arguments import flag, name_and_path, parse_arguments
from diffusers_dino.evaluation.augmentation.cells import load_cells
from diffusers_dino.evaluation.augmentation.result import AugmentationResult, Configuration, summarise
from diffusers_dino.evaluation.figures import add_legend, new_figure
from diffusers_dino.evaluation.table_text import markdown_table, with_interval
from diffusers_dino.files import make_writable_folder, write_json
from diffusers_dino.metrics.auroc import holm


@dataclass
class Arguments:
    experiments: list[str] = flag([], "FOLDER or NAME=FOLDER of each generator, in the order of the figure.")
    output_dir: str = flag("outputs/generator_size", "Where the figure and its numbers go.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    folders = dict(map(name_and_path, args.experiments))
    if len(folders) < 2 or "" in folders:
        raise ValueError("Give at least two generators as --experiments NAME=FOLDER.")
    results = {name: summarise(load_cells(Path(folder) / "cells")) for name, folder in folders.items()}
    check_comparable(results)
    compared = [
        (name, one) for name, result in results.items() for one in result.configurations if one.difference is not None
    ]
    corrected = holm([one.difference.p for _, one in compared])
    rows = [
        [name, one.regime, f"{one.mode}, {one.strategy}, 1:{one.ratio}", f"{one.mean:.3f}", tell(one), f"{p:.3f}"]
        for (name, one), p in zip(compared, corrected, strict=True)
    ]
    header = ["generator", "real images", "configuration", "macro AUROC", "gain [95 %]", "corrected p"]
    print(markdown_table(header, rows))
    folder = make_writable_folder(args.output_dir)
    write_json(folder / "generator_size.json", {"header": header, "rows": rows, "tests": len(rows)})
    draw(list(results), compared).savefig(folder / "generator_size.png", dpi=100, bbox_inches="tight")


def check_comparable(results: dict[str, AugmentationResult]) -> None:
    """ValueError if the real-only classifiers are not the same everywhere: then gains cannot be compared."""
    baselines = {
        name: {one.regime: one.macro for one in result.configurations if one.is_baseline}
        for name, result in results.items()
    }
    first, *others = baselines
    for name in others:
        shared = baselines[first].keys() & baselines[name].keys()
        if not shared or any(baselines[first][regime] != baselines[name][regime] for regime in shared):
            raise ValueError(f"{name!r} and {first!r} differ in their real-only classifiers: make them alike.")


def tell(one: Configuration) -> str:
    return with_interval(one.difference.mean, one.difference.low, one.difference.high, "+.3f")


def draw(generators: list[str], compared: list[tuple[str, Configuration]]) -> Figure:
    """A panel for each regime and mode of several generators: gains of each strategy and ratio, with intervals."""
    panels = defaultdict(list)
    for name, one in compared:
        panels[one.mode, one.regime].append((generators.index(name), one))
    panels = {panel: own for panel, own in sorted(panels.items()) if len({place for place, _ in own}) > 1}
    lines = sorted({(one.strategy, one.ratio) for _, one in compared})
    figure = new_figure(1.5 + 3.2 * len(panels), 3.6)
    columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, ((mode, regime), own) in zip(columns, panels.items(), strict=True):
        for number, (strategy, ratio) in enumerate(lines):
            points = [(place, one.difference) for place, one in own if (one.strategy, one.ratio) == (strategy, ratio)]
            axes.errorbar(
                [place + 0.08 * (number - (len(lines) - 1) / 2) for place, _ in points],
                [gain.mean for _, gain in points],
                yerr=[[gain.mean - gain.low for _, gain in points], [gain.high - gain.mean for _, gain in points]],
                marker="o",
                capsize=3,
                label=f"{strategy}, 1:{ratio}",
            )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(f"{regime} real images\n{mode}", fontsize="medium")
        axes.set_xticks(range(len(generators)), generators, fontsize="small")
        axes.set_xlim(-0.5, len(generators) - 0.5)
        axes.set_xlabel("generator")
        axes.grid(alpha=0.3, axis="y")
    figure.axes[0].set_ylabel("gain in macro AUROC, 95 % over folds")
    add_legend(figure, figure.axes)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    main()
