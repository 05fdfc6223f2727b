"""One dataclass is all there is to say about a script's flags; a YAML file may set any of them."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from transformers import HfArgumentParser

__all__ = ["flag", "parse_arguments"]

Arguments = TypeVar("Arguments")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """argparse would print all flags, and the message below them is missed."""
        self.exit(2, f"{self.prog}: error: {message}\nSee `{self.prog} --help` for the flags.\n")


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a dataclass of flags: its default and what `--help` says of it."""
    metadata["help"] = help
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_arguments(kind: type[Arguments], argv: Sequence[str] | None = None, description: str = "") -> Arguments:
    """Read flags, and before them a YAML file if one is named: `script.py config.yaml --learning_rate 1e-4`.

    The file is the first argument or follows `--config`; flags of the command line win over it. A name that is not
    known ends the program with the closest known one.

    Args:
        kind: A dataclass whose fields are flag, type, default and help.
        argv: The command line without the script's name; by default the real one.
        description: Shown above the flags by `--help`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(kind, allow_abbrev=False, description=description)
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
        argv = _flags_of(_read_yaml(config, parser), known, config, parser) + argv
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = next((text for text in unknown if text.startswith("--")), unknown[0])
        parser.error(f"there is no flag {flag}{_suggest(flag.lstrip('-').partition('=')[0], known)}")
    return kind(**vars(arguments))


def _read_yaml(path: str, parser: _Parser) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("Reading a YAML file needs PyYAML: pip install diffusers-dino[train]") from error
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"cannot read the config {path}: {error}")
    if not isinstance(content, dict):
        parser.error(f"the config {path} must be a mapping of flags to values")
    return content


def _flags_of(config: dict[str, Any], known: list[str], path: str, parser: _Parser) -> list[str]:
    """Spell a config as flags, so that the same rules check it."""
    flags: list[str] = []
    for key, value in config.items():
        if key not in known:
            parser.error(f"{path}: there is no flag {key!r}{_suggest(str(key), known)}")
        if value is None:
            continue
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        else:
            flags.append(f"--{key}={value}")  # a value may begin with a dash
    return flags


def _suggest(name: str, known: list[str]) -> str:
    close = [word for word in known if name and word.startswith(name)] or difflib.get_close_matches(name, known, n=1)
    return f". Did you mean {close[0]}?" if close else ""
