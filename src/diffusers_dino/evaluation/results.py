"""Results of experiments as files."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from ..files import write_json

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["JsonResult"]


class JsonResult:
    """A dataclass of numbers, strings, None, tuples of them and dataclasses of these, which goes to JSON and back."""

    def save(self, path: str | Path) -> None:
        """Write the figures as JSON, whole or not at all."""
        write_json(path, asdict(self), indent=2)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote."""
        return _build(cls, json.loads(Path(path).read_text()))


def _build(kind: Any, value: Any) -> Any:
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{field.name: _build(hints[field.name], value[field.name]) for field in fields(kind)})
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]  # all items of a tuple have one type
        return tuple(_build(item, part) for part in value)
    if get_origin(kind) in (Union, UnionType) and value is not None:  # `X | None`
        return _build(next(part for part in get_args(kind) if part is not NoneType), value)
    return value
