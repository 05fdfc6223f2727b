"""One self-contained HTML page: text, tables and pictures, with nothing to load from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from .files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report"]

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #8886; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; }
figure img { max-width: 100%; background: white; }
img.pixelated { image-rendering: pixelated; width: 100%; }
figcaption { font-size: .9rem; opacity: .8; }
dl { display: grid; grid-template-columns: minmax(8rem, 16rem) 1fr; gap: .5rem 1rem; }
dt { font-weight: 600; }
dd { margin: 0; }
dd strong { margin-right: .5rem; }
"""


class Report:
    """Collects the parts of a page, headed by a title, and writes them as one HTML file. All text is escaped."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def add_heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def add_text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def add_table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table; each row has one cell per column. Floats are shown with three significant digits."""
        if any(len(row) != len(header) for row in rows):
            raise ValueError(f"Each row needs {len(header)} cells, one per column.")
        head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)
        self._parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def add_answers(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """Add questions with a word each that answers them, and a sentence."""
        parts = ([html.escape(text) for text in row] for row in rows)
        body = "".join(f"<dt>{name}</dt><dd><strong>{word}</strong>{text}</dd>" for name, word, text in parts)
        self._parts.append(f"<dl>{body}</dl>")

    def add_image(self, image: Image.Image, caption: str) -> None:
        """Add a picture, embedded as PNG; small ones are enlarged without smoothing."""
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        self._add_picture(buffer.getvalue(), "image/png", caption, css_class="pixelated")

    def add_figure(self, figure: Figure, caption: str) -> None:
        """Add a matplotlib figure, embedded as SVG."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        self._add_picture(buffer.getvalue(), "image/svg+xml", caption)

    def save(self, path: str | Path) -> None:
        """Write the page, whole or not at all."""
        title = html.escape(self.title)
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{STYLE}</style></head><body><h1>{title}</h1>{''.join(self._parts)}</body></html>\n"
        )
        with atomic_write(path) as file:
            file.write(page.encode())

    def _add_picture(self, data: bytes, media_type: str, caption: str, css_class: str = "") -> None:
        source = f"data:{media_type};base64,{base64.b64encode(data).decode()}"
        text = html.escape(caption)
        self._parts.append(
            f'<figure><img class="{css_class}" alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'
        )


def _cell(value: object) -> str:
    return html.escape(f"{value:.3g}" if isinstance(value, float) else str(value))
