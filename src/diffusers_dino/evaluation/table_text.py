"""Tables in Markdown and LaTeX (booktabs), and files of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = [
    "TABLE_FORMATS",
    "escape_latex",
    "latex_float",
    "latex_line",
    "latex_table",
    "markdown_line",
    "markdown_table",
    "noted_table",
    "require_table_format",
    "with_interval",
    "write_tables",
]

TABLE_FORMATS = {"markdown": "md", "latex": "tex", "csv": "csv"}
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$"}
_LATEX |= {sign: f"\\{sign}" for sign in "%&_#${}"}


def require_table_format(style: str) -> None:
    """ValueError unless the style is one of `TABLE_FORMATS`."""
    if style not in TABLE_FORMATS:
        raise ValueError(f"A table is one of {', '.join(TABLE_FORMATS)}, not {style!r}.")


def markdown_line(cells: Sequence[object]) -> str:
    """A row of a Markdown table; a bar in a cell would end it, and is escaped."""
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def latex_line(cells: Sequence[str]) -> str:
    """A row of a LaTeX table, of cells that are LaTeX already."""
    return rf"{' & '.join(cells)} \\"


def escape_latex(text: str) -> str:
    """Text as LaTeX that prints it."""
    return "".join(_LATEX.get(sign, sign) for sign in text)


def markdown_table(header: Sequence[object], body: Sequence[Sequence[object]]) -> str:
    """A Markdown table, without a newline at its end."""
    return "\n".join(map(markdown_line, [header, ["---"] * len(header), *body]))


def latex_table(header: Sequence[str], body: Sequence[Sequence[str]], columns: str) -> str:
    """A LaTeX table of plain text, which is escaped, without a newline at its end; `columns` as in `tabular`."""
    first, *rows = (latex_line([escape_latex(cell) for cell in row]) for row in (header, *body))
    begin, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    return "\n".join([begin, r"\toprule", first, r"\midrule", *rows, r"\bottomrule", end])


def noted_table(
    style: str, header: Sequence[str], body: Sequence[Sequence[str]], note: str, columns: str | None = None
) -> str:
    """A table in Markdown with a note below, or in LaTeX with the note as a comment.

    `columns` are those of `latex_table`: by default the first on the left, the others centred.
    """
    if style == "markdown":
        return f"{markdown_table(header, body)}\n\n{note}\n"
    return f"{latex_table(header, body, columns or 'l' + 'c' * (len(header) - 1))}\n% {note}\n"


def latex_float(caption: str, tabular: str, size: str, gap: int) -> str:
    """A table with a caption, which is escaped, in a font of LaTeX's `size` and with `gap` pt between columns."""
    font = rf"\{size}\setlength{{\tabcolsep}}{{{gap}pt}}"
    begin = [r"\begin{table}", r"\centering", rf"\caption{{{escape_latex(caption)}}}", font]
    return "\n".join([*begin, tabular, r"\end{table}", ""])


def with_interval(value: float, low: float, high: float, form: str = ".3g") -> str:
    """A figure and its interval, each in a form of Python's `format`: `"0.81 [0.78, 0.84]"`."""
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def write_tables(folder: str | Path, text_of: Callable[[str], str]) -> str:
    """Write `table.md`, `table.tex` and `table.csv`, and return the first. `text_of` makes the text of a format."""
    texts = {style: text_of(style) for style in TABLE_FORMATS}
    for style, text in texts.items():
        (Path(folder) / f"table.{TABLE_FORMATS[style]}").write_text(text, encoding="utf-8")
    return texts["markdown"]
