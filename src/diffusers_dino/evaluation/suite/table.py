"""The answers of a suite as one table: Markdown, LaTeX or CSV."""

from __future__ import annotations

from ...files import csv_text
from ..table_text import noted_table, require_table_format, with_interval
from .protocol import SuiteResult

__all__ = ["format_suite_table"]

_HEADER = ["question", "figure", "value [95 %]", "control", "N", "verdict"]


def format_suite_table(result: SuiteResult, style: str = "markdown") -> str:
    """A row for each figure, beside its control. Questions that were not asked have one row that says so.

    `style` is `"markdown"`, `"latex"` or `"csv"`.
    """
    require_table_format(style)
    if style == "csv":
        header = ["question", "verdict", "figure", "value", "low", "high", "control", "n", "line"]
        rows = [
            [answer.question, answer.verdict, x.name, x.value, x.low, x.high, x.control, x.number, answer.line]
            for answer in result.answers
            for x in answer.figures
        ]
        rows += [[x.question, x.verdict, *[""] * 6, x.line] for x in result.answers if not x.figures]
        return csv_text(header, rows)
    body = []
    for answer in result.answers:
        for number, x in enumerate(answer.figures):
            first = (answer.question, answer.verdict) if number == 0 else ("", "")
            value = with_interval(x.value, x.low, x.high)
            body.append([first[0], x.name, value, x.control, x.number, first[1]])
        if not answer.figures:
            body.append([answer.question, "", "", "", "", answer.verdict])
    features = result.features
    note = f"Images at {result.size} px, seed {result.seed}. Fidelity: {features.extractor}, {features.layer}."
    if missing := [f"{x.question}: {x.line}" for x in result.answers if not x.figures]:
        note += f" Not asked: {' '.join(missing)}"
    return noted_table(style, _HEADER, body, note, "llcllc")
