"""The data sets that are known, and how to open them or one's own."""

from __future__ import annotations

import difflib
from functools import lru_cache
from pathlib import Path
from typing import Any

from .description import Source, describe, read_yaml
from .reader import OpenSource

__all__ = ["DESCRIPTIONS", "catalogue_page", "find_source", "open_source", "source_names"]

DESCRIPTIONS = Path(__file__).parent / "descriptions"


def source_names() -> list[str]:
    """Names of the sources of the catalogue, sorted."""
    return sorted(path.stem for path in DESCRIPTIONS.glob("*.yaml"))


def find_source(name_or_yaml: str | Path) -> Source:
    """The description of a data set.

    Args:
        name_or_yaml: A name of the catalogue, or a YAML file with the attributes of `Source`. In the file,
            `base: NAME` takes those of a source of the catalogue, over which the file's own win.

    Raises:
        ValueError: If the name is unknown, or the file describes no source. The message suggests the closest name.
        FileNotFoundError: If the YAML file is not there.
    """
    text = str(name_or_yaml)
    if not text.endswith((".yaml", ".yml")):
        return _built_in(text)
    if not Path(text).is_file():
        raise FileNotFoundError(f"There is no file {text!r} that describes a source.")
    mapping = read_yaml(text)
    base = mapping.pop("base", None)
    if base is not None:
        mapping = _built_in_mapping(str(base)) | mapping
    return describe(mapping, text)


def open_source(name_or_yaml: str | Path, root: str | Path, find_unlisted: bool = True) -> OpenSource:
    """Open a data set as users get it when they download it: an iterable of `Record`. No image is read.

    Args:
        name_or_yaml: What it is: see `find_source`.
        root: The folder it was unpacked in.
        find_unlisted: Whether to look for images that no row of the tables belongs to: see `OpenSource`.

    Raises:
        ValueError: If the source is unknown or badly described, or a table does not fit.
        FileNotFoundError: If the folder or a table that is needed is not there.
    """
    return OpenSource(find_source(name_or_yaml), root, find_unlisted)


def catalogue_page() -> str:
    """The catalogue for people, in Markdown: a table, and a section for each source."""
    sources = [_built_in(name) for name in source_names()]
    head = "| name | data set | images | patients | labels | split | masks | holds images of |"
    rows = [head, "|" + " --- |" * (head.count("|") - 1), *map(_table_line, sources)]
    return "\n".join([*rows, "", *map(_section, sources)])


def _table_line(source: Source) -> str:
    facts = [source.patient, source.labels, source.split, source.masks]
    images = f"{source.images:,}" if source.images else "?"
    held = ", ".join(f"`{name}`" for name in source.contains)
    cells = [f"`{source.name}`", f"[{source.title}]({source.url})", images, *("yes" if x else "" for x in facts), held]
    return f"| {' | '.join(cells)} |"


def _section(source: Source) -> str:
    files = [" or ".join(f"`{name}`" for name in table.files) for table in (*source.table, *source.join)]
    references = [source.doi and f"doi:{source.doi}", source.arxiv and f"arXiv:{source.arxiv}"]
    lines = {
        "Images": " or ".join(f"`{pattern}`" for pattern in source.patterns),
        "Tables": "; ".join(files),
        "Pixels": source.pixels,
        "Views": source.views,
        "Licence": source.licence,
        "Cite": ", ".join(filter(None, [source.citation, *references])),
        "Layout checked": source.verified,
        "Note": source.notes,
    }
    return "\n".join(
        [f"### {source.name}", "", *(f"- **{name}**: {text}" for name, text in lines.items() if text), ""]
    )


@lru_cache
def _built_in(name: str) -> Source:
    return describe(_built_in_mapping(name), f"{name}.yaml")


def _built_in_mapping(name: str) -> dict[str, Any]:
    names = source_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=2, cutoff=0.4)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Known are {', '.join(names)}."
        raise ValueError(f"There is no source {name!r}. {hint} Your own is given as a YAML file.")
    return read_yaml(DESCRIPTIONS / f"{name}.yaml")
