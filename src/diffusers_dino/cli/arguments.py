"""One dataclass is all there is to say about a command's flags; a YAML file may set any of them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from transformers import HfArgumentParser

from ..extras import require

__all__ = ["flag", "parse_arguments"]

Arguments = TypeVar("Arguments")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, with its example; the default behind each flag."""


class _Parser(HfArgumentParser):
    """Flags under the headings that `flag(..., group=...)` begins."""

    _group: Any = None

    def _parse_dataclass_field(self, parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        if title := field.metadata.get("group"):
            self._group = self.add_argument_group(title)
        metadata = {name: value for name, value in field.metadata.items() if name != "group"}
        plain = dataclasses.field(default=field.default, default_factory=field.default_factory, metadata=metadata)
        plain.name, plain.type = field.name, field.type
        super()._parse_dataclass_field(self._group or parser, plain)

    def error(self, message: str) -> NoReturn:
        """argparse would print all flags, and the message below them is missed."""
        self.exit(2, f"{self.prog}: error: {message}\nSee `{self.prog} --help` for the flags.\n")


def flag(default: Any, help: str, group: str | None = None, **metadata: Any) -> Any:
    """A field of a dataclass of flags: its default, what `--help` says of it, and the heading that begins with it."""
    metadata = {"help": help, "group": group, **metadata}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_arguments(
    kind: type[Arguments],
    argv: Sequence[str] | None = None,
    description: str | None = "",
    prog: str | None = None,
    owner_of: Callable[[str], str | None] = lambda name: None,
) -> Arguments:
    """Read flags, and before them a YAML file if one is named: `script.py config.yaml --learning_rate 1e-4`.

    The file is the first argument or follows `--config`; flags of the command line win over it. A name that is not
    known ends the program with the closest known one.

    Args:
        kind: A dataclass whose fields are flag, type, default and help.
        argv: The command line without the program's name; by default the real one.
        description: Shown above the flags by `--help`.
        prog: Name of the program in messages; by default the script's.
        owner_of: Which other command has a flag of a given name, for a config that was written for it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    usage = "%(prog)s [CONFIG.yaml] [--FLAG VALUE ...]"
    parser = _Parser(kind, prog=prog, usage=usage, allow_abbrev=False, description=description, formatter_class=_Help)
    config = None
    if argv and not argv[0].startswith("-"):
        config, argv = argv[0], argv[1:]
    elif "--config" in argv and not any(field.name == "config" for field in dataclasses.fields(kind)):
        place = argv.index("--config")
        if place + 1 == len(argv):
            parser.error("--config needs the path of a YAML file")
        config, argv = argv[place + 1], argv[:place] + argv[place + 2 :]
    known = [option.lstrip("-") for option in parser._option_string_actions]
    if config is not None:
        argv = _flags_of(_read_yaml(config, parser), known, config, parser, owner_of) + argv
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        name = next((text for text in unknown if text.startswith("--")), unknown[0])
        parser.error(f"there is no flag {name}{_suggest(name.lstrip('-').partition('=')[0], known, owner_of)}")
    return kind(**vars(arguments))


def _read_yaml(path: str, parser: _Parser) -> dict[str, Any]:
    yaml = require("yaml", "train", "Reading a YAML file needs PyYAML")
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"cannot read the config {path}: {error}")
    if not isinstance(content, dict):
        parser.error(f"the config {path} must be a mapping of flags to values")
    return content


def _flags_of(
    config: dict[str, Any], known: list[str], path: str, parser: _Parser, owner_of: Callable[[str], str | None]
) -> list[str]:
    """Spell a config as flags, so that the same rules check it."""
    flags: list[str] = []
    for key, value in config.items():
        if key not in known:
            parser.error(f"{path}: there is no flag {key!r}{_suggest(str(key), known, owner_of)}")
        if value is None:
            continue
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        else:
            flags.append(f"--{key}={value}")  # a value may begin with a dash
    return flags


def _suggest(name: str, known: list[str], owner_of: Callable[[str], str | None]) -> str:
    close = [word for word in known if name and word.startswith(name)] or difflib.get_close_matches(name, known, n=1)
    if close:
        return f". Did you mean {close[0]}?"
    return f". It is a flag of `{owner}`" if (owner := owner_of(name)) else ""
