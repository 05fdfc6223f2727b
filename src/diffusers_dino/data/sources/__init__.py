"""Where the images, labels, patients, views and splits of a provider's data set are. Only `masks` reads images."""

from .catalogue import catalogue_page, find_source, open_source, source_names
from .description import Source
from .lineage import Overlap, lineage, overlaps
from .prevalence import label_prevalence, select_labels
from .reader import OpenSource
from .record import Record
from .recorded import describe_source, recorded_sources, require_synthetic
from .report import SourceReport

__all__ = [
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
    "recorded_sources",
    "require_synthetic",
    "select_labels",
    "source_names",
]
