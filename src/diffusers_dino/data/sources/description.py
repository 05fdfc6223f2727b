"""What a data set is and how it lies on disk: one form of description for the catalogue and for your own data."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ...files import read_regular
from ..images.reading import RawLayout
from .fields import LabelRule, Value, as_list, as_words, require_column

__all__ = ["Source", "Table", "describe", "read_yaml"]

T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """A file with one row for each image, or, in `join`, with more columns for the rows.

    Attributes:
        file: Path below the root, or several of which the first that exists is taken. `*` is a wildcard.
        format: `"csv"` (also `.tsv`, and either as `.gz`), `"coco"` (columns `file_name`, `id` and `categories`,
            separated by `|`) or `"openi"` (a folder or `.tgz` of report XMLs; columns `image`, `report` and `mesh`,
            separated by `|`).
        delimiter: Separator of the cells of a CSV; by default a tab in `.tsv`, else a comma.
        encoding: Of a CSV; a byte order mark is recognised.
        skip_rows: Lines before the header.
        columns: Columns to add with the same value in each row, such as `{split: train}`.
        match: In `join`: a template of the rows' columns, such as `"{study_id}"`, that finds the row to add.
        key: In `join`: the same template in this table's columns, where they have other names.
        optional: Whether the source can be read without this file; its columns are then blank.
        torchxrayvision: File in the package torchxrayvision, if installed, to use where the root has none.
    """

    file: str | Sequence[str]
    format: str = "csv"
    delimiter: str | None = None
    encoding: str = "utf-8"
    skip_rows: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)
    match: str | None = None
    key: str | None = None
    optional: bool = False
    torchxrayvision: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the rows, in their order."""
        return (self.file,) if isinstance(self.file, str) else tuple(self.file)


@dataclass(frozen=True)
class Source:
    """A data set: what it is, and where its images, patients, labels, views, splits and masks are.

    Templates name columns in braces. Besides the columns of the tables there are `row` (number of the row, from 0),
    `path` (of the image, below the root), `folder` and `stem` (its folder; its name without the extension), and the
    named groups of `derive`.

    Attributes:
        name: How to call it: letters, digits and `_`.
        image: Template(s) of the image's path below the root; the first that exists is taken. Folders may hold `*`.
            Without `table` it is a glob, and each file that matches is an image.
        inventory: Glob(s) of all images, to find those without a row; by default `image` with `*` for each column.
        table: File(s) with the rows, one after the other.
        join: Further files, whose columns are added.
        derive: Column -> regular expression(s); the named groups of the first that matches become columns.
        where: Column -> value(s): other rows are left out.
        id: Template of the provider's name of the image; by default its path without the extension.
        patient: Patient id (see `fields.Value`). Without it, each image is its own patient.
        labels: One `fields.LabelRule`, or several whose findings are joined. Without it: unlabelled.
        view: The view (see `fields.Value`); normalised.
        split: The official split (see `fields.Value`); normalised. Or `{lists: {split: file}, key: template}`: files
            that name the images of a split, one on each line, by the template; by default by the id.
        masks: Template(s) of mask files; those that exist together are the mask.
        raw: How to read a headerless file (`RawLayout`).
        invert: `{"from": column, "values": [...]}`: for which values the file holds dark bones.
        sidecar: Extension of a JSON file beside each image whose values become columns, named by their path in it,
            such as `00280004.Value.0`.
        repeats: Several rows of one image: None counts them as an error and keeps the first; `"any"` joins their
            findings; `"majority"` keeps what more than half of the raters state.
        rater: With `repeats`: column that names the rater of a row; by default each row has its own.
        contains: Names of other sources, some of whose images this one holds.
        title, images, modality, pixels, views, licence, citation, arxiv, doi, url, notes, verified: For people: number
            of images, polarity and bit depth, what to know, and what the layout was compared with. What is unknown is
            left out.
    """

    name: str
    image: str | Sequence[str]
    inventory: Sequence[str] = ()
    table: Sequence[Table] = ()
    join: Sequence[Table] = ()
    derive: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    where: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    id: str | None = None
    patient: Any = None
    labels: Sequence[LabelRule] = ()
    view: Any = None
    split: Any = None
    masks: Sequence[str] = ()
    raw: RawLayout | None = None
    invert: Mapping[str, Any] | None = None
    sidecar: str | None = None
    repeats: str | None = None
    rater: str | None = None
    title: str = ""
    images: int | None = None
    modality: str = ""
    pixels: str = ""
    views: str = ""
    licence: str = ""
    citation: str = ""
    arxiv: str = ""
    doi: str = ""
    url: str = ""
    contains: Sequence[str] = ()
    notes: str = ""
    verified: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+", self.name):
            raise ValueError(f"{self.name!r} is not a name of a source: use letters, digits and _")
        if self.repeats not in (None, "any", "majority"):
            raise ValueError(f"repeats is any or majority, got {self.repeats!r}")
        for name in ("patient", "view", "split"):
            self._check_value(name, getattr(self, name))
        object.__setattr__(self, "where", {column: tuple(as_words(words)) for column, words in self.where.items()})
        if self.invert is not None:
            if not isinstance(self.invert, Mapping) or set(self.invert) != {"from", "values"}:
                raise ValueError(f"invert is {{from: COLUMN, values: [WORD]}}, got {self.invert!r}")
            object.__setattr__(self, "invert", {**self.invert, "values": tuple(as_words(self.invert["values"]))})
        if self.id is not None:
            require_column("id", self.id)
        if self.sidecar is not None:
            object.__setattr__(self, "sidecar", f".{self.sidecar.lstrip('.')}")
        for pattern in self.patterns if self.table else ():
            require_column("image", pattern)

    def _check_value(self, name: str, given: Any) -> None:
        """Refuse a value that cannot be read, and a patient that is the same for all images."""
        if isinstance(given, Mapping) and "lists" in given:
            return
        if isinstance(given, Mapping) and "from" not in given:
            require_column(name, given)
        for text in as_list(given["from"] if isinstance(given, Mapping) else given):
            if name == "patient" or not isinstance(text, str):
                require_column(name, text)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Where an image may be; the first path that exists is taken."""
        return tuple(pattern.removeprefix("./") for pattern in as_list(self.image))

    def value(self, name: str) -> Value | None:
        """`patient`, `view` or `split` as a `Value`; None where the source has none, or has it in lists."""
        description = getattr(self, name)
        if description is None or (isinstance(description, Mapping) and "lists" in description):
            return None
        return Value(description)


def describe(mapping: Mapping[str, Any], where: str = "the description") -> Source:
    """Build a `Source` from the mapping that a YAML file holds; `ValueError` names a key or value that is wrong."""
    values = dict(mapping)
    for key in ("table", "join"):
        values[key] = [_build(Table, table, f"{key} of {where}") for table in as_list(values.get(key))]
    values["labels"] = [_build(LabelRule, rule, f"labels of {where}") for rule in as_list(values.get("labels"))]
    if values.get("raw") is not None:
        values["raw"] = _build(RawLayout, values["raw"], f"raw of {where}")
    for key in ("inventory", "masks", "contains"):
        values[key] = as_list(values.get(key))
    source = _build(Source, values, where)
    for expression in (one for several in source.derive.values() for one in as_list(several)):
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(f"derive of {where}: {expression!r} is not a regular expression: {error}") from error
    return source


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ValueError if the file holds anything else."""
    import yaml  # comes with transformers and accelerate

    try:
        mapping = yaml.safe_load(read_regular(path).decode("utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not a YAML file: {error}") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"{str(path)!r} does not describe a source: give a mapping with at least name and image.")
    return mapping


def _build(kind: type[T], mapping: Any, where: str) -> T:
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{where} must be a mapping, got {mapping!r}")
    known = [entry.name for entry in fields(kind)]  # type: ignore[arg-type]
    for key in mapping:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Known are {', '.join(known)}."
            raise ValueError(f"{where} has the unknown key {key!r}. {hint}")
    try:
        return kind(**{key: value for key, value in mapping.items() if value is not None})  # blank: as left out
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {str(error).replace(f'{kind.__name__}.__init__() ', '')}") from error
