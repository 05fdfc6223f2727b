"""Data sets as their providers distribute them: where images, labels, patients, views, splits and masks are."""

from .catalogue import catalogue_page, find_source, layout_facts, open_source, source_names
from .description import Source
from .overlap import PHANTOMS, Overlap, describe_source, lineage, overlaps
from .reader import OpenSource
from .records import Record, label_prevalence, select_labels
from .rows import SourceReport

__all__ = [
    "PHANTOMS",
    "OpenSource",
    "Overlap",
    "Record",
    "Source",
    "SourceReport",
    "catalogue_page",
    "describe_source",
    "find_source",
    "label_prevalence",
    "layout_facts",
    "lineage",
    "open_source",
    "overlaps",
    "select_labels",
    "source_names",
]
