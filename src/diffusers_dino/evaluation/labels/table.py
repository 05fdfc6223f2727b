"""The label-preservation report as a table: Markdown, LaTeX or CSV. Text alone, nothing is computed."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from ...files import atomic_write
from ..table_text import TABLE_FORMATS, escape_latex, latex_line, markdown_line, require_table_format
from .result import Agreement, LabelPreservationResult, Part

__all__ = ["format_preservation_table", "write_preservation_tables"]


def write_preservation_tables(result: LabelPreservationResult, folder: str | Path) -> list[Path]:
    """Write `result.json`, `table.md`, `table.tex` and `table.csv` into a folder, and return their paths."""
    folder = Path(folder)
    result.save(folder / "result.json")
    paths = [folder / f"table.{suffix}" for suffix in TABLE_FORMATS.values()]
    for path, style in zip(paths, TABLE_FORMATS, strict=True):
        with atomic_write(path) as file:
            file.write(format_preservation_table(result, style).encode())
    return [folder / "result.json", *paths]


def format_preservation_table(result: LabelPreservationResult, style: str = "markdown") -> str:
    """Sets, ratios and bins of the fraction as rows: AUROC of the labels that were given, and what it is beside.

    Args:
        result: The report.
        style: `"markdown"` (macro, and below it each label of whole sets), `"latex"` (macro, a float with caption;
            needs booktabs), or `"csv"`, which has a line for each part and label, with all figures.

    Raises:
        ValueError: If the style is unknown.
    """
    require_table_format(style)
    return {"markdown": _markdown, "latex": _latex, "csv": _csv}[style](result)


_HEADER = [
    "set",
    "ratio",
    "|fraction - 0.5|",
    "images (patients)",
    "synthetic",
    "their sources",
    "difference",
    "shuffled labels",
]


def _markdown(result: LabelPreservationResult) -> str:
    lines = [markdown_line(_HEADER), markdown_line(["---"] * len(_HEADER))]
    lines += [markdown_line([*_names(part), *_figures(part.macro)]) for part in result.parts]
    header = ["set", "label", "images with it", *_HEADER[4:]]
    lines += ["", *_note(result), "", markdown_line(header), markdown_line(["---"] * len(header))]
    for part in result.wholes:
        lines += [markdown_line([part.name, x.label, x.num_positive, *_figures(x)]) for x in part.labels]
    for real in result.real:
        figures = [_bounded(real.auroc, real.low, real.high), "", "", ""]
        number = "" if real.label == "macro" else real.num_positive
        lines.append(markdown_line(["held-out real images", real.label, number, *figures]))
    return "\n".join([*lines, ""])


def _latex(result: LabelPreservationResult) -> str:
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(' '.join(_note(result)))}}}",
        r"\footnotesize\setlength{\tabcolsep}{2pt}",
        rf"\begin{{tabular}}{{lll{'c' * (len(_HEADER) - 3)}}}",
        r"\toprule",
        latex_line([escape_latex(name) for name in _HEADER]),
        r"\midrule",
    ]
    for part in result.parts:
        lines.append(latex_line([escape_latex(cell) for cell in (*_names(part), *_figures(part.macro))]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _csv(result: LabelPreservationResult) -> str:
    places = ["name", "strategy", "ratio", "near", "far", "num_images", "num_patients"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*places, *Agreement.__dataclass_fields__])
    for part in result.parts:
        for figures in (part.macro, *part.labels):
            values = [getattr(figures, name) for name in Agreement.__dataclass_fields__]
            writer.writerow([*(getattr(part, name) for name in places), *values])
    return text.getvalue()


def _names(part: Part) -> list[str]:
    bounds = "all" if part.near is None else f"{part.near:g} to {part.far:g}"
    return [part.name, f"1:{part.ratio:g}", bounds, f"{part.num_images} ({part.num_patients})"]


def _figures(figures: Agreement) -> list[str]:
    shuffled = "" if figures.shuffled_low is None else f"{figures.shuffled_low:.3f} to {figures.shuffled_high:.3f}"
    return [
        _bounded(figures.synthetic, figures.synthetic_low, figures.synthetic_high),
        _bounded(figures.sources, figures.sources_low, figures.sources_high),
        _bounded(figures.difference, figures.difference_low, figures.difference_high, "+"),
        shuffled,
    ]


def _bounded(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    if value is None:
        return "one class"
    interval = "" if low is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    return f"{value:{sign}.3f}{interval}"


def _note(result: LabelPreservationResult) -> list[str]:
    macro = result.real[0]
    return [
        f"Macro AUROC, over {len(result.labels)} labels ({', '.join(result.labels)}), of the labels that synthetic "
        f"images were given, by classifiers ({result.model}, seed {result.judges_seed}) trained on real images of "
        "other patients than those of their sources; 95 % bootstrap intervals over patients.",
        "Beside it the same classifiers on the real images that the labels are of, and the middle 95 % of shuffles of "
        "the labels.",
        f"The classifiers reach {_bounded(macro.auroc, macro.low, macro.high)} on held-out images of the "
        f"{result.num_real} real ones ({result.num_real_patients} patients, {result.num_folds} folds, two held out).",
    ]
