"""One dataclass is all there is to say about a command's flags; a YAML file may set any of them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from transformers import HfArgumentParser

__all__ = ["flag", "name_and_path", "parse_arguments", "settings_of"]

Arguments = TypeVar("Arguments")
Settings = TypeVar("Settings")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, with its example; the default behind each flag that has one of its own."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action, argparse._StoreFalseAction):  # HfArgumentParser adds --no_x to a switch x that is on
            return f"The same as --{action.dest} False."
        return super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """Flags under the headings that `flag(..., group=...)` begins."""

    _group: Any = None

    def _parse_dataclass_field(self, parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        if title := field.metadata.get("group"):
            known = (group for group in self._action_groups if group.title == title)
            self._group = next(known, None) or self.add_argument_group(title)
        metadata = {name: value for name, value in field.metadata.items() if name != "group"}
        plain = dataclasses.field(default=field.default, default_factory=field.default_factory, metadata=metadata)
        plain.name, plain.type = field.name, field.type
        super()._parse_dataclass_field(self._group or parser, plain)

    def error(self, message: str) -> NoReturn:
        """argparse would print all flags, and the message below them is missed."""
        self.exit(2, f"{self.prog}: error: {message}\nSee `{self.prog} --help` for the flags.\n")


def flag(default: Any, help: str, group: str | None = None, **metadata: Any) -> Any:
    """A field of a dataclass of flags: its default, what `--help` says of it, and the heading that begins with it.

    Under a heading that has begun before, it goes on.
    """
    metadata = {"help": help, "group": group, **metadata}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(kind: type[Settings], args: Any, **others: Any) -> Settings:
    """A dataclass of the library: `others`, and what the flags say that are called as its other fields."""
    names = {field.name for field in dataclasses.fields(kind)} - set(others)
    return kind(**others, **{name: getattr(args, name) for name in names if hasattr(args, name)})


def parse_arguments(
    kind: type[Arguments],
    argv: Sequence[str] | None = None,
    description: str | None = "",
    prog: str | None = None,
    owner_of: Callable[[str], str | None] = lambda name: None,
    skip_foreign_keys: bool = False,
) -> Arguments:
    """Read flags, and before them a YAML file if one is named: `script.py config.yaml --learning_rate 1e-4`.

    The file is the first argument or follows `--config`; flags of the command line win over it. An unknown name ends
    the program with the closest known one, or with the command that has it (`owner_of`). With `skip_foreign_keys`,
    keys of the file that are not nearly a flag are left out, as they may be another program's.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    usage = "%(prog)s [CONFIG.yaml] [--FLAG VALUE ...]"
    parser = _Parser(kind, prog=prog, usage=usage, allow_abbrev=False, description=description, formatter_class=_Help)
    known = [option.lstrip("-") for option in parser._option_string_actions]

    def refuse(name: str, place: str = "") -> NoReturn:
        parser.error(f"{place}there is no flag {name}{_suggest(name.strip('-'), known, owner_of)}")

    path = None
    if argv and not argv[0].startswith("-"):
        path, argv = argv[0], argv[1:]
    elif "--config" in argv and "config" not in known:
        place = argv.index("--config")
        if place + 1 == len(argv):
            parser.error("--config needs the path of a YAML file")
        path, argv = argv[place + 1], argv[:place] + argv[place + 2 :]
    if path is not None:
        config = _read_yaml(path, parser)
        foreign = [key for key in config if key not in known]
        wrong = [key for key in foreign if _closest(key, known, 0.85)] if skip_foreign_keys else foreign
        if wrong:
            refuse(wrong[0], f"{path}: ")
        if foreign:
            print(f"{path}: left out, since they are not for this command: {', '.join(foreign)}", file=sys.stderr)
        argv = [word for key, value in config.items() if key in known for word in _as_flag(key, value)] + argv
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse(next((text for text in unknown if text.startswith("--")), unknown[0]).partition("=")[0])
    return kind(**vars(arguments))


def _read_yaml(path: str, parser: _Parser) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig")) or {}
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        parser.error(f"cannot read the config {path}: {error}")
    if not isinstance(content, dict):
        parser.error(f"the config {path} must be a mapping of flags to values")
    return {str(key): value for key, value in content.items()}


def _as_flag(key: str, value: Any) -> list[str]:
    """An entry of a config as words of a command line, so that the same rules check it."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={value}"]  # a value may begin with a dash


def _suggest(name: str, known: list[str], owner_of: Callable[[str], str | None]) -> str:
    if close := _closest(name, known, 0.85):
        return f". Did you mean {close}?"
    if owner := owner_of(name):
        return f". It is a flag of `{owner}`"
    return f". Did you mean {close}?" if (close := _closest(name, known, 0.6)) else ""


def _closest(name: str, known: list[str], cutoff: float) -> str | None:
    """The known name that begins with this one, or that is most like it; None if none is."""
    beginning = [word for word in known if name and word.startswith(name)]
    return next(iter(beginning or difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)


def name_and_path(text: str) -> tuple[str, str]:
    """`NAME=PATH`, or `PATH`, which is called as its last part."""
    name, sign, path = text.partition("=")
    return (name, path) if sign and "/" not in name else (os.path.basename(os.path.abspath(text)) or text, text)
