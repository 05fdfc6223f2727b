"""Results of experiments as files."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from ..files import read_json, write_json

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["JsonResult"]

_LARGEST = 1 << 30  # bytes
_JSON = {int: int, float: (int, float), str: str, bool: bool}


class JsonResult:
    """A dataclass of numbers, strings, None, tuples of them and dataclasses of these, which goes to JSON and back."""

    def save(self, path: str | Path) -> None:
        """Write the figures as JSON, whole or not at all."""
        write_json(path, asdict(self), indent=2)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote, also by an older version; ValueError if it is another kind of file, or damaged."""
        content = read_json(path, _LARGEST)
        try:
            return _build(cls, content, "")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a {cls.__name__}, or is damaged: {error}.") from error


def _build(kind: Any, value: Any, place: str) -> Any:
    if get_origin(kind) in (Union, UnionType):  # `X | None`
        return None if value is None else _build(next(x for x in get_args(kind) if x is not NoneType), value, place)
    expected = dict if is_dataclass(kind) else list if get_origin(kind) is tuple else _JSON.get(kind, object)
    if not isinstance(value, expected) or (isinstance(value, bool) and kind is not bool):
        wanted = " or ".join(one.__name__ for one in (expected if isinstance(expected, tuple) else (expected,)))
        raise ValueError(f"{place or 'it'} is a {type(value).__name__}, not a {wanted}")
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        if missing := [f.name for f in fields(kind) if f.name not in value and f.default is MISSING]:
            raise ValueError(f"{place or 'it'} lacks {', '.join(missing)}")
        names = [field.name for field in fields(kind) if field.name in value]
        return kind(**{name: _build(hints[name], value[name], f"{place}.{name}".strip(".")) for name in names})
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]  # all items of a tuple have one type
        return tuple(_build(item, part, f"{place}[{number}]") for number, part in enumerate(value))
    return value
