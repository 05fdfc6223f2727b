"""Commands as a page shows them: what they name must exist, and their flags must be those that the program knows."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest.mock import patch

from diffusers_dino.cli import COMMANDS, split_command
from diffusers_dino.cli.arguments import parse_arguments
from pages import REPOSITORY

_HEREDOC = re.compile(r"<<-?\s*'?(\w+)'?([^\n]*)\n.*?\n\1$", re.DOTALL | re.MULTILINE)
_SCRIPT = re.compile(r"(?:examples|benchmarks)/[\w/]+\.py$")
_PROGRAM = {"diffusers-dino", "diffusers_dino"}
_SHELL = {"for", "do", "done", "then", "if", "while"}


class WrongCommandError(AssertionError):
    """A command that a reader could not run."""


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command of a piece of shell, without redirections."""
    code = _HEREDOC.sub(r"\2", code).replace("\\\n", " ")
    for line in code.splitlines():
        words: list[str] = []
        for word in _words(line):
            if word and set(word) <= set(";&|()<>"):
                yield words
                words = []
            else:
                words.append(word)
        yield words


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def check_command(words: list[str], configs: dict[str, str] | None = None) -> None:
    """Raise `WrongCommandError` unless all that a command names is there.

    Args:
        words: One of `commands`.
        configs: Text of YAML files that the page shows, by name.
    """
    words = [word for word in words if word not in _SHELL]
    place = next((i for i, word in enumerate(words) if _SCRIPT.search(word)), None)
    own = next((i for i, word in enumerate(words) if word in _PROGRAM), None)
    for word in words:
        if re.match(r"(?:examples|benchmarks|docs|tests|src)/[\w/.-]+$", word) and not (REPOSITORY / word).exists():
            raise WrongCommandError(f"There is no {word}.")
    if place is not None:
        _check_launcher(words[:place])
        _check_program(words[place], words[place + 1 :], configs or {})
    elif own is not None and words[own + 1 :]:
        _check_launcher(words[:own])
        name, arguments = split_command(words[own + 1 :])
        if name not in COMMANDS:
            raise WrongCommandError(f"There is no command {name!r}.")
        _check_program(name, arguments, configs or {})
    elif "make" in words[:1]:
        check_target(words[1:])
    elif "pip" in words and "install" in words:
        for word in words:
            check_requirement(word)


def check_target(words: list[str]) -> None:
    for word in words:
        if re.fullmatch(r"[a-z][\w-]*", word) and word not in make_targets():
            raise WrongCommandError(f"The Makefile has no target {word}.")


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def check_requirement(word: str) -> None:
    """`diffusers-dino[extra,...]` names extras that the package has."""
    match = re.search(r"diffusers[-_]dino(?:-[\w.]+\.whl)?\[([^\]]*)\]", word)
    if unknown := set(match[1].replace(" ", "").split(",") if match else ()) - extras():
        raise WrongCommandError(f"diffusers-dino has no extra {', '.join(sorted(unknown))}.")


@cache
def extras() -> set[str]:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    table = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", table, re.MULTILINE))


def _check_launcher(words: list[str]) -> None:
    """Flags between `accelerate launch` or `torchrun` and the script are theirs."""
    known = launcher_flags(words[0] if words[0] != "srun" else words[1]) if words else None
    if known is None:
        return
    for word in words:
        if word.startswith("--") and word.partition("=")[0] not in known:
            raise WrongCommandError(f"{words[0]} has no flag {word}.")


@cache
def launcher_flags(name: str) -> set[str] | None:
    if name == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        return set(launch_command_parser()._option_string_actions)
    if name == "torchrun":
        from torch.distributed.run import get_args_parser

        names = set(get_args_parser()._option_string_actions)
        return (
            names | {name.replace("-", "_") for name in names} | {f"--{name[2:].replace('-', '_')}" for name in names}
        )
    return None


def _check_program(program: str, arguments: list[str], configs: dict[str, str]) -> None:
    """The parser of a script or of a command of `diffusers-dino` reads the arguments: names, types and choices."""
    if arguments and arguments[0].endswith(".yaml"):
        arguments = [_config(arguments[0], configs), *arguments[1:]]
    if "--config" in arguments[:-1]:
        place = arguments.index("--config") + 1
        arguments = [*arguments[:place], _config(arguments[place], configs), *arguments[place + 1 :]]
    if _SCRIPT.search(program):
        path = Path(program) if Path(program).is_absolute() else REPOSITORY / program
        problem = parse_as_script(path, arguments)
    else:
        problem = parse_as_command(program, arguments)
    if problem:
        raise WrongCommandError(f"{program} does not take {' '.join(arguments)!r}: {problem}")


def _config(name: str, configs: dict[str, str]) -> str:
    """The file that stands for a YAML file of the command line; one that the page only imagines is empty."""
    if (REPOSITORY / name).is_file():
        return str(REPOSITORY / name)
    path = Path("imagined.yaml").resolve()
    path.write_text(configs.get(name, next(iter(configs.values()), "")), encoding="utf-8")
    return str(path)


def parse_as_command(name: str, arguments: list[str]) -> str | None:
    """What a command of `diffusers-dino` says against its arguments, or None if it takes them."""
    if "--help" in arguments:
        return None
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
        try:
            command = COMMANDS[name]
            parse_arguments(command.load().Arguments, arguments, skip_foreign_keys=command.shares_config)
        except (SystemExit, TypeError) as end:
            return errors.getvalue().strip() or str(end)
    return None


class _Parsed(BaseException):
    """Ends a script where it has read its arguments."""


def parse_as_script(path: Path, arguments: list[str]) -> str | None:
    """What a script says against its arguments, or None if it takes them. Nothing after its parser runs."""
    original = argparse.ArgumentParser.parse_known_args
    depth = 0

    def parse_known_args(parser, args=None, namespace=None, **options):
        nonlocal depth
        depth += 1
        try:
            known, unknown = original(parser, args, namespace, **options)
        finally:
            depth -= 1
        if depth:  # of a subcommand
            return known, unknown
        raise _Parsed(f"unknown: {' '.join(unknown)}" if unknown else "")

    errors = io.StringIO()
    with (
        patch.object(argparse.ArgumentParser, "parse_known_args", parse_known_args),
        patch.object(sys, "argv", [path.name, *arguments]),
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(errors),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except _Parsed as parsed:
            return str(parsed) or None
        except SystemExit as end:
            return (errors.getvalue().strip() or "it ends") if end.code else None  # 0 is that of --help
    return "it reads no arguments"
