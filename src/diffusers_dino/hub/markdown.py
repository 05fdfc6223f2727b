"""Markdown that the cards of models and of synthetic sets share: tables, data sets with their terms, BibTeX."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .privacy import without_folders

__all__ = ["cite", "fact_table", "needs_agreement", "origin", "plain", "table", "table_cell", "without_html"]

_ADDRESS = re.compile(r"https?://[^\s()<>|\"'`\\]+")
_ALWAYS_CITED = ("jimenezperez2024dinodiffusion", "caron2021emerging", "rombach2022high")


def cite(*keys: str) -> str:
    """BibTeX of the method, of DINO and Stable Diffusion, which it stands on, and of the further works named."""
    text = Path(__file__).with_name("citations.bib").read_text(encoding="utf-8")
    entries = re.finditer(r"^@\w+\{(.+?),\n.*?^\}\n", text, re.DOTALL | re.MULTILINE)
    return "".join(entry[0] for entry in entries if entry[1] in {*_ALWAYS_CITED, *keys})


def origin(sources: Sequence[Mapping[str, Any]], derived: str) -> str:
    """The data sets that a model or set is derived from, as `TrainingRecord.sources` has them, with their terms."""
    terms = f"Their terms apply to what is derived from them, this {derived} included."
    if not sources:
        return f"Which data sets the images are from is not on record here. {terms}"
    rows = [
        [_linked(source), source.get("licence") or "not on record", source.get("contains"), source.get("citation")]
        for source in sources
    ]
    parts = [table(["data set", "licence", "holds images of", "cite"], rows), terms]
    if signed := [plain(f"{_title(one)} ({one['licence']})") for one in sources if needs_agreement(one)]:
        parts.append(
            f"**Credentialed data.** {'; '.join(signed)}: the provider gives these images only to those who have "
            "agreed to its terms, and they may not be passed on. Models can hold parts of what they were trained on. "
            f"Anybody who uses or shares this {derived} has to follow the terms of these sources, which may ask that "
            "derived work is shared under the same agreement."
        )
    return "\n\n".join(parts)


def needs_agreement(source: Mapping[str, Any]) -> bool:
    """Whether each user has to sign the licence of a data set or be credentialed for it."""
    return re.search(r"credentialed|restricted|agreement", source.get("licence") or "", re.IGNORECASE) is not None


def fact_table(facts: Mapping[str, Any]) -> str:
    """Facts by name as a table; those without a value are left out."""
    known = [(name, value) for name, value in facts.items() if value not in (None, [], "")]
    return table(["", ""], known) if known else "Nothing is on record."


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table; each cell as `table_cell` writes it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(table_cell, line))} |" for line in lines)


def table_cell(value: Any) -> str:
    """A value, or the values of a list, on one line; None is empty, and local paths lose their folders."""
    if isinstance(value, _Link):
        return value
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    text = plain(", ".join(str(without_folders(item)) for item in values))
    return text.replace("\\|", "&#92;|").replace("|", "\\|")  # a backslash before would undo the second


def plain(text: str) -> str:
    """Text on one line that Markdown shows as it is, where it could be HTML, a link or a picture."""
    return without_html(" ".join(text.split())).replace("](", "]\\(")


def without_html(text: str) -> str:
    """Markdown whose tags are shown and do nothing."""
    return text.replace("<", "&lt;")


class _Link(str):
    """Markdown that goes into a table as it is."""


def _linked(source: Mapping[str, Any]) -> str:
    title, url = _title(source), source.get("url")
    return _Link(f"[{table_cell(title)}]({url})") if url and _ADDRESS.fullmatch(str(url)) else title


def _title(source: Mapping[str, Any]) -> str:
    return str(source.get("title") or source.get("name") or "unknown")
