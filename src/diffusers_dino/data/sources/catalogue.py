"""The known data sets, and how to open them or your own."""

from __future__ import annotations

import difflib
from functools import lru_cache
from pathlib import Path
from typing import Any

from .description import Source, describe, read_yaml
from .reader import OpenSource

__all__ = ["catalogue_page", "find_source", "layout_facts", "open_source", "source_names"]

_DESCRIPTIONS = Path(__file__).parent / "descriptions"


def source_names() -> list[str]:
    """The names in the catalogue, sorted."""
    return sorted(path.stem for path in _DESCRIPTIONS.glob("*.yaml"))


def find_source(name_or_yaml: str | Path) -> Source:
    """The description of a data set, by its name in the catalogue or in a YAML file of the attributes of `Source`.

    In the file, `base: NAME` takes those of a source of the catalogue; its own override them. `ValueError` if the name
    is unknown or the file is wrong.
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


def open_source(name_or_yaml: str | Path, root: str | Path) -> OpenSource:
    """Open a data set as it is downloaded: an iterable of `Record`. No image is read.

    See `find_source` and `OpenSource` for the arguments and errors.
    """
    return OpenSource(find_source(name_or_yaml), root)


def layout_facts(source: Source) -> dict[str, str]:
    """How a data set is laid out and described, by heading; what is unknown is left out."""
    files = [" or ".join(f"`{name}`" for name in table.files) for table in (*source.table, *source.join)]
    references = [source.doi and f"doi:{source.doi}", source.arxiv and f"arXiv:{source.arxiv}"]
    facts = {
        "Images": " or ".join(f"`{pattern}`" for pattern in source.patterns),
        "Tables": "; ".join(files),
        "Pixels": source.pixels,
        "Views": source.views,
        "Licence": source.licence,
        "Cite": ", ".join(filter(None, [source.citation, *references])),
        "Layout checked": source.verified,
        "Note": source.notes,
    }
    return {name: text for name, text in facts.items() if text}


def catalogue_page() -> str:
    """The catalogue as a table in Markdown; `layout_facts` has what `diffusers-dino sources --name` tells of each."""
    sources = [_built_in(name) for name in source_names()]
    lines = ["| name | data set | images | patients | labels | split | masks | holds images of |"]
    lines.append("|" + " --- |" * (lines[0].count("|") - 1))
    for source in sources:
        facts = [source.patient, source.labels, source.split, source.masks]
        cells = [f"`{source.name}`", f"[{source.title}]({source.url})", f"{source.images:,}" if source.images else "?"]
        cells += ["yes" if fact else "" for fact in facts] + [", ".join(f"`{name}`" for name in source.contains)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


@lru_cache
def _built_in(name: str) -> Source:
    return describe(_built_in_mapping(name), f"{name}.yaml")


def _built_in_mapping(name: str) -> dict[str, Any]:
    names = source_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=2, cutoff=0.4)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Known are {', '.join(names)}."
        raise ValueError(f"There is no source {name!r}. {hint} Your own is given as a YAML file.")
    return read_yaml(_DESCRIPTIONS / f"{name}.yaml")
