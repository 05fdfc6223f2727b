"""Where the images, labels, patients, views and splits of a provider's data set are. Only `masks` reads images."""

from .catalogue import catalogue_page, find_source, open_source, source_names
from .description import Source
from .lineage import PHANTOMS, Overlap, describe_source, lineage, overlaps
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
    "lineage",
    "open_source",
    "overlaps",
    "select_labels",
    "source_names",
]
