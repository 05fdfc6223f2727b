"""The settings that a folder was begun with: written once, and compared when a later run continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .files import read_json, write_json
from .fingerprints import as_json

__all__ = ["differences", "freeze", "require_same"]


def freeze(
    path: str | Path, settings: dict[str, Any], error: type[Exception] = ValueError, place: str | Path | None = None
) -> None:
    """Write the settings of a folder to a JSON file; raise `error` if the one there is damaged, or says otherwise.

    `settings` are all that decides what the folder will hold. A setting of None is as good as none, so that a folder
    from before there was such a setting is accepted. `place` is what the message calls the folder.
    """
    path = Path(path)
    if not path.is_file():
        write_json(path, settings)
        return
    begun = read_json(path, error=error)
    if not isinstance(begun, dict):
        raise error(f"{path} is damaged: it holds no settings. Give another output folder.")
    require_same(begun, settings, place or path.parent, error)


def require_same(
    begun: dict[str, Any], now: dict[str, Any], place: str | Path, error: type[Exception] = ValueError
) -> None:
    """Raise `error` with a line for each setting in which a folder's first run and this one differ."""
    if lines := differences(as_json(begun), as_json(now)):
        raise error(
            "\n- ".join([f"{place} was begun with other settings:", *lines])
            + "\nGo on with the settings it was begun with, or give another output folder."
        )


def differences(begun: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """A line for each entry in which two nested dictionaries differ."""
    lines = []
    for name in begun | now:
        there, here = begun.get(name), now.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            lines += differences(there, here, f"{prefix}{name}: ")
        elif there != here:
            lines.append(f"{prefix}{name} was {there}, is {here}")
    return lines
