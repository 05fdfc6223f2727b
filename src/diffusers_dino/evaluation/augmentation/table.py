"""Table 1 of the paper from a result: Markdown, LaTeX or CSV. Results are shown, not computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from ...files import csv_text
from ..table_text import escape_latex, latex_float, latex_line, markdown_table, require_table_format
from .cells import INTERPOLATION, JUDGED, SOFT
from .result import AugmentationResult, Configuration, Difference, LabelFigures

__all__ = ["MARKS", "format_augmentation_table", "format_label_table", "significance_mark"]

MARKS = {0.001: "***", 0.01: "**", 0.05: "*"}  # of corrected p values


def format_augmentation_table(result: AugmentationResult, style: str = "markdown") -> str:
    """Regimes and ratios as rows, modes and strategies as columns.

    A cell holds the macro AUROC (mean, standard deviation over folds) and below it the difference to the real-only
    baseline with its interval; where folds are missing it says how many are there. Styles: `"markdown"`, `"latex"`
    (a float with caption, needs booktabs), or `"csv"`, with a line for each configuration and label, with all figures.
    """
    require_table_format(style)
    return {"markdown": _markdown, "latex": _latex, "csv": _csv}[style](result)


def format_label_table(result: AugmentationResult) -> str:
    """Configurations as rows, labels as columns: mean AUROC, and difference with its interval. Markdown."""
    body = []
    for row in result.configurations:
        labels = {label.label: _cell(row, label, result.num_folds) for label in row.labels}
        cells = [labels.get(name, _unfinished(row, result.num_folds)) for name in result.labels]
        kind = ("", "real only", "") if row.is_baseline else (f"1:{row.ratio}", row.mode, row.strategy)
        body.append([row.regime, *kind, _cell(row, row, result.num_folds), *cells])
    positive: dict[str, int] = {}  # a configuration that is not finished has fewer
    for label in (label for row in result.configurations for label in row.labels):
        positive[label.label] = max(positive.get(label.label, 0), label.num_positive)
    counts = ", ".join(f"{name} {number}" for name, number in positive.items())
    tests = result.num_tests * len(result.labels)
    return "\n".join(
        [
            markdown_table(["regime", "ratio", "mode", "strategy", "macro", *result.labels], body),
            f"\nTest images with the label: {counts} of {result.num_images}.\n",
            f"Stars of single labels are corrected for {tests} comparisons, those of macro for {result.num_tests}.\n",
        ]
    )


def significance_mark(difference: Difference | None) -> str:
    """Stars of a corrected p value, or nothing."""
    if difference is None:
        return ""
    return next((mark for bound, mark in MARKS.items() if difference.corrected_p < bound), "")


def _note(result: AugmentationResult) -> str:
    """What a reader must know."""
    marks = ", ".join(f"{mark} p < {bound:g}" for bound, mark in reversed(MARKS.items()))
    sentences = [
        f"Macro AUROC over {len(result.labels)} labels ({', '.join(result.labels)}): mean ± standard deviation over "
        f"{result.num_folds} folds that keep patients whole, {result.num_images} test images of "
        f"{result.num_patients} patients; {result.model}, seed {result.experiment_seed}.",
        "Below it the difference to only real images in the same regime, with its 95 % interval by the t test over "
        "folds whose variance is corrected for shared training images (Nadeau & Bengio 2003).",
        f"{marks}: of that test, corrected for {result.num_tests} comparisons (Holm).",
    ]
    there = {row.strategy for row in result.configurations}
    if any(name.removesuffix(JUDGED) == SOFT for name in there):
        sentences.append(f"{SOFT}: the images of {INTERPOLATION}, with probabilities of the labels of both ends.")
    if any(name.endswith(JUDGED) for name in there):
        sentences.append(
            f"{JUDGED}: without the images that a judge contradicts, which has seen real images of no regime "
            "and of no test patient; fewer images are left than the ratio says."
        )
    if result.undefined:
        sentences.append(f"Left out of their fold's mean, having one class there: {', '.join(result.undefined)}.")
    if result.missing:
        sentences.append(
            f"Unfinished: {len(result.missing)} cells are missing; a configuration without all its folds has no mean."
        )
    return " ".join(sentences)


def _markdown(result: AugmentationResult) -> str:
    kinds = _kinds(result)
    header = ["regime", "ratio", "real only", *(f"{mode}, {strategy}" for mode, strategy in kinds)]
    body = [
        [regime, ratio, *("" if cell is None else _cell(cell, cell, result.num_folds) for cell in cells)]
        for regime, ratio, cells in _rows(result, kinds)
    ]
    return "\n".join([markdown_table(header, body), "", _note(result).replace("*", r"\*"), ""])


def _latex(result: AugmentationResult) -> str:
    kinds = _kinds(result)
    spans, rules, column = [], [], 4
    for mode, items in groupby(mode for mode, _ in kinds):
        width = len(list(items))
        spans.append(rf"\multicolumn{{{width}}}{{c}}{{{escape_latex(mode)}}}")
        rules.append(rf"\cmidrule(lr){{{column}-{column + width - 1}}}")
        column += width
    lines = [
        rf"\begin{{tabular}}{{rlc{'c' * len(kinds)}}}",
        r"\toprule",
        latex_line(["", "", "", *spans]),
        " ".join(rules),
        latex_line(["regime", "ratio", "real only", *(escape_latex(strategy) for _, strategy in kinds)]),
    ]
    for regime, ratio, cells in _rows(result, kinds):
        lines.append(r"\midrule" if regime else r"\addlinespace")
        texts = [("", "") if cell is None else _latex_cell(cell, result.num_folds) for cell in cells]
        lines.append(latex_line([regime, ratio, *(figure for figure, _ in texts)]))
        lines.append(latex_line(["", "", *(difference for _, difference in texts)]))
    return latex_float(_note(result), "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]), "small", 3)


def _kinds(result: AugmentationResult) -> list[tuple[str, str]]:
    """Mode and strategy of the columns."""
    kinds = [(row.mode, row.strategy) for row in result.configurations if not row.is_baseline]
    return sorted(dict.fromkeys(kinds), key=lambda kind: kind[0])


def _rows(
    result: AugmentationResult, kinds: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, str, list[Configuration | None]]]:
    """Regime (named once), ratio, and the cells: the baseline only in the first row of a regime."""
    for regime, members in groupby(result.configurations, key=lambda row: row.regime):
        found = {(row.ratio, row.mode, row.strategy): row for row in members}
        baseline = next((row for row in found.values() if row.is_baseline), None)
        ratios = sorted({ratio for ratio, _, _ in found if ratio})
        for place, ratio in enumerate(ratios or [0]):
            first = place == 0
            cells = [found.get((ratio, *kind)) for kind in kinds]
            yield str(regime) if first else "", f"1:{ratio}" if ratio else "", [baseline if first else None, *cells]


def _cell(row: Configuration, figures: Configuration | LabelFigures, num_folds: int) -> str:
    if figures.mean is None:
        return _unfinished(row, num_folds) if len(row.folds) < num_folds else "one class"
    spread = getattr(figures, "sd", None)
    text = f"{figures.mean:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")
    if (d := figures.difference) is None:
        return text
    mark = significance_mark(d).replace("*", r"\*")
    return f"{text}<br>{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}] {mark}".strip()


def _unfinished(row: Configuration, num_folds: int) -> str:
    return f"{len(row.folds)} of {num_folds} folds"


def _latex_cell(row: Configuration, num_folds: int) -> tuple[str, str]:
    """The figure and, for the line below, the difference."""
    if row.mean is None:
        return _unfinished(row, num_folds), ""
    figure = f"{row.mean:.3f}" + ("" if row.sd is None else rf" $\pm$ {row.sd:.3f}")
    if (d := row.difference) is None:
        return figure, ""
    mark = significance_mark(d)
    star = rf"\textsuperscript{{{mark}}}" if mark else ""
    return f"{figure}{star}", rf"{{\scriptsize ${d.mean:+.3f}$ [${d.low:+.3f}$, ${d.high:+.3f}$]}}"


def _csv(result: AugmentationResult) -> str:
    places, figures = ["regime", "strategy", "mode", "ratio"], ["mean", "sd", "patients_low", "patients_high"]
    differences, folds = list(Difference.__dataclass_fields__), range(result.num_folds)
    header = [*places, "label", "images", "patients", "positive", "finished_folds", *figures]
    header += [*(f"difference_{name}" for name in differences), *(f"fold_{fold}" for fold in folds)]
    body = []
    for row in result.configurations:
        for one in (row, *row.labels):
            by_fold = dict(zip(row.folds, row.macro if one is row else one.folds, strict=True))
            line = [getattr(row, name) for name in places]
            line += [getattr(one, "label", "macro"), row.num_images, row.num_patients]
            line += [getattr(one, "num_positive", None), len(row.folds)]
            line += [getattr(one, name, None) for name in figures]
            line += [getattr(one.difference, name, None) for name in differences]
            body.append([*line, *(by_fold.get(fold) for fold in folds)])
    return csv_text(header, body)
