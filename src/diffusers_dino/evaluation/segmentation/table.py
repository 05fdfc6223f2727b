"""Table 2 of the paper from results: Markdown, LaTeX or CSV. Results are shown, not computed."""

from __future__ import annotations

from collections.abc import Sequence

from ...files import csv_text
from ..table_text import latex_table, markdown_table, require_table_format, with_interval
from .protocol import MethodScores, SegmentationResult

__all__ = ["format_segmentation_table"]


def format_segmentation_table(results: Sequence[SegmentationResult], style: str = "markdown") -> str:
    """Methods as rows, data sets as columns: mean Dice coefficient with its interval, and median with quartiles.

    `style` is `"markdown"`, `"latex"` or `"csv"`; the last has a line for each method and data set, with all figures.
    ValueError if there is no result.
    """
    require_table_format(style)
    if not results:
        raise ValueError("There is no result to show.")
    if style == "csv":
        return _csv(results)
    rows: dict[tuple[str, str], list[str]] = {}
    for place, result in enumerate(results):
        for scores in result.methods:
            cells = rows.setdefault((scores.method, scores.selection), [""] * (2 * len(results)))
            cells[2 * place] = with_interval(scores.mean, scores.low, scores.high, ".3f")
            cells[2 * place + 1] = f"{scores.median:.3f} ({scores.lower_quartile:.3f}, {scores.upper_quartile:.3f})"
    header = ["method", "chosen by"]
    for result in results:
        header += [f"{result.dataset} (N = {len(result.keys)}): mean Dice [95 %]", "median (quartiles)"]
    body = [[*names, *cells] for names, cells in rows.items()]
    first = results[0]
    seconds = {(x.method, x.selection): f"{x.seconds:.2f}" for x in first.methods if x.seconds is not None}
    if seconds:
        header.append("seconds an image" if len(results) == 1 else f"seconds an image of {first.dataset}")
        body = [[*row, seconds.get((row[0], row[1]), "")] for row in body]
    if style == "latex":
        return f"{latex_table(header, body, 'll' + 'c' * (len(header) - 2))}\n"
    notes = [_note(result.dataset, scores) for result in results for scores in result.methods if scores.chosen]
    heading = "Settings chosen on one half of the patients and scored on the other, both ways:"
    if unknown := [result.dataset for result in results if not result.patients_known]:
        notes.append(f"- {', '.join(unknown)}: patients are not known, so the halves are of images")
    return "\n".join([markdown_table(header, body), *(["", heading, "", *notes] if notes else []), ""])


def _note(dataset: str, scores: MethodScores) -> str:
    first, second = scores.chosen
    settings = first if first == second else f"{first} / {second}"
    return f"- {dataset}, {scores.method}: {settings}; the setting that is best on all gives {scores.optimistic:.3f}"


def _csv(results: Sequence[SegmentationResult]) -> str:
    figures = ("mean", "low", "high", "median", "lower_quartile", "upper_quartile", "optimistic")
    names = ["dataset", "images", "method", "chosen by"]
    body = [
        [
            *(result.dataset, len(result.keys), scores.method, scores.selection),
            *(getattr(scores, name) for name in figures),
            *(scores.chosen or ("", "")),
            scores.seconds,
        ]
        for result in results
        for scores in result.methods
    ]
    return csv_text([*names, *figures, "chosen on the first half", "on the second half", "seconds an image"], body)
