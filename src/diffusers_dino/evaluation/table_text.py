"""Lines of tables in Markdown and LaTeX (booktabs)."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["TABLE_FORMATS", "escape_latex", "latex_line", "markdown_line", "require_table_format"]

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
