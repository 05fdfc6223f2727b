"""From the cells of a row to the facts of an image: templates, views, splits and labels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

__all__ = [
    "Finding",
    "LabelRule",
    "Row",
    "Template",
    "Value",
    "as_list",
    "as_words",
    "combine",
    "is_blank",
    "is_one_of",
    "normalize_split",
    "normalize_view",
    "require_column",
]

Row = Mapping[str, str]

_BLANK = frozenset({"", "nan", "none", "null", "na", "n/a"})
_QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")
_VIEWS = {
    "PA": ("pa", "posteroanterior"),
    "AP": ("ap", "anteroposterior", "ap supine", "ap_supine", "ap horizontal", "ap_horizontal", "ap erect"),
    "LATERAL": ("l", "ll", "rl", "lat", "lateral", "left lateral", "right lateral", "large lateral"),
    "FRONTAL": ("frontal",),
}
_SPLITS = {
    "train": ("train", "training", "tr"),
    "validation": ("validation", "validate", "valid", "val", "dev"),
    "test": ("test", "testing", "te"),
}
_VIEW_OF = {word: view for view, words in _VIEWS.items() for word in words}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}


def as_list(value: Any) -> list[Any]:
    """What a description gives one or several of; a text is one, not its letters."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def as_words(value: Any) -> list[Any]:
    """`as_list` of words and numbers; `ValueError` for truth values."""
    words = as_list(value)
    if any(isinstance(word, bool) for word in words):
        raise ValueError("YAML reads yes, no, on and off as truth values: put them in quotes")
    return words


def require_column(name: str, template: Any) -> None:
    """Refuse a template that is the same for all images, with ValueError: it names a column without braces."""
    if isinstance(template, Mapping) and len(template) == 1 and set(template.values()) == {None}:
        template = next(iter(template))  # YAML reads {column} without quotes as a mapping
    elif isinstance(template, str) and Template(template).columns:
        return
    raise ValueError(f'{name} is a column in braces and quotes: write "{{{template}}}", not {template}')


def is_blank(value: str) -> bool:
    """Whether a cell is empty, or holds what pandas and others write for a missing value (`nan`, `None`, ...)."""
    value = value.strip()
    return len(value) < 5 and value.lower() in _BLANK


def normalize_view(value: str) -> str | None:
    """`"PA"`, `"AP"`, `"LATERAL"` or `"FRONTAL"` for usual spellings, None for unknown, else the word in capitals."""
    word = value.strip().lower()
    if word in _BLANK or word in ("unk", "unknown"):
        return None
    return _VIEW_OF.get(word, value.strip().upper())


def normalize_split(value: str) -> str | None:
    """`"train"`, `"validation"` or `"test"`; None for a blank; raises ValueError for any other word."""
    word = value.strip().lower()
    if word in _BLANK:
        return None
    if word not in _SPLIT_OF:
        raise ValueError(f"{value!r} is not a split: give train, validation or test, or map it to one of them")
    return _SPLIT_OF[word]


class Template:
    """Text with names of columns in braces, such as `"images/{Image Index}"`. A brace itself cannot be written."""

    def __init__(self, text: str) -> None:
        self.text = text
        parts = re.split(r"\{([^{}]+)\}", text)
        self._literals = parts[::2]
        self.columns = tuple(parts[1::2])

    def fill(self, row: Row) -> str:
        """The text with the row's cells filled in; `""` if one of them is blank."""
        if len(self.columns) == 1 and self._literals == ["", ""]:  # a bare column is the usual case
            value = row[self.columns[0]].strip()
            return "" if is_blank(value) else value
        values = [row[column].strip() for column in self.columns]
        if any(is_blank(value) for value in values):
            return ""
        return "".join(a + b for a, b in zip(self._literals, [*values, ""], strict=True))

    def wildcard(self) -> str:
        """The text with `*` for each column."""
        return "*".join(self._literals)


class Value:
    """One fact of an image: the first of some templates that is not blank, translated by a map.

    Its description is a template, a list of them, or `{"from": template(s), "map": {value: word}}`, where the key
    `"*"` stands for any other value.
    """

    def __init__(self, description: str | Sequence[str] | Mapping) -> None:
        self._map: dict[str, str] = {}
        if isinstance(description, Mapping):
            self._map = {str(key): str(word) for key, word in description.get("map", {}).items()}
            description = description["from"]
        self.templates = [Template(text) for text in as_list(description)]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a row that are read."""
        return tuple(column for template in self.templates for column in template.columns)

    def read(self, row: Row) -> str:
        """The value, `""` if it is blank."""
        value = next(filter(None, (template.fill(row) for template in self.templates)), "")
        return self._map.get(value, self._map.get("*", value)) if self._map and value else value


@dataclass(frozen=True)
class Finding:
    """What one row says: findings present, findings uncertain, and whether it says anything."""

    present: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()
    labelled: bool = False


@dataclass(frozen=True)
class LabelRule:
    """How labels are written. One of `column`, `columns` and `constant` is given.

    Attributes:
        column: A template whose value is one label, or several with `separator` or `list`.
        separator: Separator of the labels of `column`, such as `"|"`.
        list: Whether `column` is a list of quoted words (`"['nodule', 'normal']"`), as Python, NumPy or MIDS write it.
        head: Separator of a label of `column` and its qualifiers (`"/"` in `Opacity/lung/base`), which are dropped.
        map: Value of `column` -> label, or `[]` for no finding; the key `"*"` stands for any other value, `""` for a
            blank. A value that is not in the map is left as it is.
        columns: Names of columns with one finding each, or `"*"` for all that are not in `exclude`.
        exclude: Columns that are not findings, if `columns` is `"*"`.
        positive, negative, uncertain: Cells of `columns` that state, deny or doubt a finding; numbers compare as
            numbers (`1` is `1.0`). Any other cell that is not blank is an error.
        none: Labels that mean that nothing was found, such as `No Finding`.
        unlabelled: Labels that say nothing of the image, such as PadChest's `unchanged`.
        rename: Label -> label.
        constant: Labels that all images have.
    """

    column: str | None = None
    separator: str | None = None
    list: bool = False
    head: str | None = None
    map: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    columns: Sequence[str] | str = ()
    exclude: Sequence[str] = ()
    positive: Sequence[str | float] = (1,)
    negative: Sequence[str | float] = (0,)
    uncertain: Sequence[str | float] = (-1,)
    none: Sequence[str] = ()
    unlabelled: Sequence[str] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    constant: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("exclude", "none", "unlabelled", "constant"):
            object.__setattr__(self, name, as_words(getattr(self, name)))
        for name in ("positive", "negative", "uncertain"):
            object.__setattr__(self, name, as_list(getattr(self, name)))
        if self.columns != "*":
            object.__setattr__(self, "columns", as_list(self.columns))
        if sum(map(bool, (self.column, self.columns, self.constant))) != 1:
            raise ValueError("labels need exactly one of column, columns and constant")
        if self.column:
            require_column("labels: column", self.column)
        as_words(list(self.map))
        object.__setattr__(self, "map", {str(key): label for key, label in self.map.items()})

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns that it reads, except for `columns: "*"`."""
        if self.column:
            return _template(self.column).columns
        return () if isinstance(self.columns, str) else tuple(self.columns)

    def findings_columns(self, header: Iterable[str]) -> tuple[str, ...]:
        """The columns of findings among those of a table."""
        if self.columns != "*":
            return tuple(self.columns)
        return tuple(column for column in header if column not in self.exclude)

    def read(self, row: Row, columns: Sequence[str] = ()) -> Finding:
        """What a row says; `columns` are its `findings_columns`."""
        if self.constant:
            return Finding(tuple(self.constant), labelled=True)
        return self._read_columns(row, columns) if self.columns else self._read_column(row)

    def _read_columns(self, row: Row, columns: Sequence[str]) -> Finding:
        present, uncertain, labelled = [], [], False
        for column in columns:
            value = row[column].strip()
            if value.lower() in _BLANK:
                continue
            labelled = True
            if is_one_of(value, tuple(self.positive)):
                present.append(column)
            elif is_one_of(value, tuple(self.uncertain)):
                uncertain.append(column)
            elif not is_one_of(value, tuple(self.negative)):
                known = [*self.positive, *self.negative, *self.uncertain]
                raise ValueError(f"Column {column!r} holds {value!r}, but only {known} are known: list it in labels")
        return self._finish(present, uncertain, labelled)

    def _read_column(self, row: Row) -> Finding:
        assert self.column is not None
        value = _template(self.column).fill(row)
        if not value and "" not in self.map:
            return Finding()
        if self.list:
            words = [(a or b).strip() for a, b in _QUOTED.findall(value)] or re.split(r"[,\t]", value.strip("[]"))
        else:
            words = value.split(self.separator) if self.separator else [value]
        labels: list[str] = []
        denied = False
        for word in words:
            word = (word.split(self.head)[0] if self.head else word).strip()
            label = self.map.get(word, self.map.get("*", word))
            labels += [label] if isinstance(label, str) else label
            denied |= not label and not isinstance(label, str)
        return self._finish(labels, [], labelled=denied)

    def _finish(self, present: Sequence[str], uncertain: Sequence[str], labelled: bool) -> Finding:
        said = [label for label in present if not is_blank(label) and label not in self.unlabelled]
        findings = [self.rename.get(label, label) for label in said if label not in self.none]
        doubted = [self.rename.get(label, label) for label in uncertain if label not in self.none]
        doubted = [label for label in doubted if label not in findings]
        return Finding(tuple(dict.fromkeys(findings)), tuple(dict.fromkeys(doubted)), labelled or bool(said))


def combine(findings: Sequence[Finding], majority: bool = False) -> Finding:
    """Join statements about one image, such as those of several radiologists: what any of them states.

    With `majority`, what more than half of those state that say anything.
    """
    if len(findings) == 1:
        return findings[0]
    voters = [finding for finding in findings if finding.labelled]
    needed = len(voters) // 2 + 1 if majority else 1

    def voted(names: Iterable[str]) -> list[str]:
        names = list(names)
        return [name for name in dict.fromkeys(names) if names.count(name) >= needed]

    present = voted(name for voter in voters for name in voter.present)
    uncertain = voted(name for voter in voters for name in voter.uncertain)
    return Finding(tuple(present), tuple(name for name in uncertain if name not in present), bool(voters))


@lru_cache
def _template(text: str) -> Template:
    return Template(text)


@lru_cache
def is_one_of(value: str, known: tuple[str | float, ...]) -> bool:
    """Whether a cell is one of some words, or equals one of some numbers."""
    try:
        number = float(value)
    except ValueError:
        return value in map(str, known)
    return value in known or any(number == other for other in known if not isinstance(other, str))
