"""Commands, configs and data that README and documentation show: what they name exists and is taken."""

import inspect
import json
import os
import re
from functools import cache
from pkgutil import resolve_name

import pytest
import yaml

import commands
from commands import WrongCommandError, check_command, check_requirement, check_target, launcher_flags
from diffusers_dino.cli import COMMANDS
from pages import REPOSITORY, blocks, inline_code, name_of, pages

SHELL_PAGES = [page for page in pages() if any(blocks(page, "bash"))]
# Flags in running text that are of other programs
FOREIGN_FLAGS = {
    *("--extra-index-url", "--find-links", "--no-deps", "--no-index", "--only-binary", "--platform"),
    *("--python-version", "--help"),
}
SCRIPTS = [
    path
    for folder in ("examples", "benchmarks")
    for path in sorted((REPOSITORY / folder).glob("*.py"))
    if '__main__":' in path.read_text(encoding="utf-8")
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Scripts that are asked for their flags write nothing into the repository, and leave the environment alone."""
    monkeypatch.chdir(tmp_path)
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("page", SHELL_PAGES, ids=name_of)
def test_the_commands_of_a_page_are_taken(page):
    configs = {block.page.name: block.code for block in blocks(page, "yaml")}
    for block in blocks(page, "bash"):
        for words in commands.commands(block.code):
            try:
                check_command(words, configs)
            except WrongCommandError as error:
                pytest.fail(f"{block}: {error}")


DOCSTRINGS = {path.name: path.read_text(encoding="utf-8").split('"""')[1] for path in SCRIPTS}
DOCSTRINGS |= {name: command.load().__doc__ for name, command in COMMANDS.items()}


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_the_commands_of_a_docstring_are_taken(name):
    """Those that stand indented in the docstring of a script or of a command."""
    for words in commands.commands("\n".join(re.findall(r"^    (.*)$", DOCSTRINGS[name], re.MULTILINE))):
        check_command(words)


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("examples/slurm/*.sh")), ids=lambda path: path.name)
def test_the_commands_of_a_batch_script_are_taken(path):
    for words in commands.commands(path.read_text(encoding="utf-8")):
        check_command([word for word in words if word not in ('"$@"', "$@")])


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_what_a_page_names_in_its_text_exists(page):
    for code in inline_code(page):
        if match := re.match(r"make ((?:[a-z]+ ?)+)", code):
            check_target(match[1].split())
        if match := re.match(r"(?:examples|benchmarks|tests|src)/[\w/.-]+$", code):
            assert (REPOSITORY / code).exists(), code
        if re.match(r"diffusers_dino\.[\w.]+$", code):
            assert inspect.getdoc(resolve_name(code)), f"{code} has no docstring"
        check_requirement(code)
        for flag in re.findall(r"^--[\w-]+(?=$|[ =])", code):
            assert flag in flags_of_scripts() | FOREIGN_FLAGS, f"no script has {flag}"


@cache
def flags_of_scripts():
    """Names of flags in dataclasses and parsers of all scripts, read without importing them, and of launchers."""
    names = launcher_flags("accelerate") | launcher_flags("torchrun")
    for path in (
        each
        for folder in ("src/diffusers_dino/cli", "examples", "benchmarks")
        for each in (REPOSITORY / folder).rglob("*.py")
    ):
        text = path.read_text(encoding="utf-8")
        names |= {f"--{name}" for name in re.findall(r"^    (\w+): [^=\n]+(?:=|$)", text, re.MULTILINE)}
    return names


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_json_and_yaml_parse(page):
    for block in blocks(page, "json"):
        json.loads(block.code)
    for block in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(block.code), dict), str(block)


def test_the_page_of_the_installation_names_all_extras():
    table = (REPOSITORY / "docs/installation.md").read_text(encoding="utf-8").split("| extra |")[1].split("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    assert named == commands.extras()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python examples/train_dino.py --no_such_flag 1", "no_such_flag"),
        ("diffusers-dino synthesise --strategy guess", "invalid choice"),
        ("diffusers-dino synthesise my_set.yaml", "no flag ratoi"),
        ("diffusers-dino no-such", "There is no command 'no-such'"),
        ("python examples/no_such_script.py", "There is no examples/no_such_script.py"),
        ("accelerate launch --no_such 2 examples/train_dino.py", "accelerate has no flag --no_such"),
        ("cd x && make no-such-target", "no target no-such-target"),
        ('pip install "diffusers-dino[train,no-such]"', "no extra no-such"),
    ],
)
def test_a_wrong_command_is_seen(command, message):
    *before, last = commands.commands(command)
    for words in before:
        check_command(words)
    with pytest.raises(WrongCommandError, match=message):
        check_command(last, {"page.md": "ratoi: 5\n"})
