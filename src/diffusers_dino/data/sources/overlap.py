"""Which data sets hold images of which others, and what manifests and cards say of a data set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from .catalogue import find_source, source_names
from .description import Source

__all__ = ["PHANTOMS", "Overlap", "describe_source", "lineage", "overlaps"]

PHANTOMS = Source(
    name="phantom_cxr",
    image="*.tar",
    title="Phantom chest radiographs of diffusers-dino",
    licence="CC BY 3.0, as the CT scan that they are rendered from (LIDC-IDRI-0001)",
    citation="Armato et al., Data From LIDC-IDRI, The Cancer Imaging Archive, 2015",
    url="https://doi.org/10.7937/K9/TCIA.2015.LO9QL9SX",
)


@dataclass(frozen=True)
class Overlap:
    """Two chosen sources that may hold the same images: those of the sets `through`, which may be one of the two."""

    first: str
    second: str
    through: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.first} and {self.second} may hold the same images (of {', '.join(self.through)})"


def lineage(source: Source | str) -> set[str]:
    """The names of a source and of all sources whose images it holds, directly or through others."""
    source = source if isinstance(source, Source) else find_source(source)
    known = set(source_names())
    found: set[str] = {source.name}
    waiting = list(source.contains)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += find_source(name).contains if name in known else []
    return found


def overlaps(sources: Iterable[Source | str]) -> list[Overlap]:
    """The pairs of the chosen sources that may hold the same images.

    The search for duplicates in `make_shards` shows whether they do. A split by patient does not keep such copies
    together, since they have other patient ids or none.
    """
    lines = [(source if isinstance(source, str) else source.name, lineage(source)) for source in sources]
    pairs = ((one, two, tuple(sorted(a & b))) for (one, a), (two, b) in combinations(lines, 2))
    return [Overlap(one, two, shared) for one, two, shared in pairs if shared]


def describe_source(source: Source | str) -> dict[str, Any]:
    """What manifests and cards say of a data set: name, title, licence, citation, url, contains.

    Takes what `find_source` takes, a `Source`, or `"phantom_cxr"` for the bundled phantoms.
    """
    if source == PHANTOMS.name:
        source = PHANTOMS
    source = source if isinstance(source, Source) else find_source(source)
    shown = ("name", "title", "licence", "citation", "url")
    return {name: getattr(source, name) for name in shown} | {"contains": sorted(lineage(source) - {source.name})}
