"""Commands, configs and data that README and documentation show: what they name exists and is taken."""

import json
import os
import re
from functools import cache
from itertools import pairwise

import pytest
import yaml

import commands
from commands import WrongCommandError, check_command, check_requirement, check_target, launcher_flags
from diffusers_dino.metrics.features import EXTRACTORS
from pages import REPOSITORY, blocks, inline_code, name_of, pages

SHELL_PAGES = [page for page in pages() if any(blocks(page, "bash"))]
# Flags in running text that are of other programs
FOREIGN_FLAGS = {
    *(
        "--no-index",
        "--find-links",
        "--no-deps",
        "--extra-index-url",
        "--platform",
        "--python-version",
        "--only-binary",
    ),
    "--help",
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


def extractors_without_weights(words: list[str]) -> list[str]:
    """Feature extractors that a command names without the file that they need."""
    pairs = dict(pairwise(words))
    flags = {"--features": "--weights", "--extractor": "--weights", "--metric_features": "--metric_weights"}
    named = [pairs[flag] for flag, weights in flags.items() if flag in pairs and weights not in pairs]
    return [name for name in named if name in set(EXTRACTORS) - {"pixels", "local-contrast"}]


@pytest.mark.parametrize("page", SHELL_PAGES, ids=name_of)
def test_extractors_are_named_with_their_weights(page):
    for block in blocks(page, "bash"):
        for words in commands.commands(block.code):
            assert not extractors_without_weights(words), block


def test_an_extractor_without_weights_is_seen():
    assert extractors_without_weights(["evaluate fidelity", "--features", "xrv", "--model", "m"]) == ["xrv"]
    assert not extractors_without_weights(["evaluate fidelity", "--features", "xrv", "--weights", "w"])
    assert not extractors_without_weights(["evaluate fidelity", "--features", "pixels"])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_commands_of_a_script_are_taken(path):
    """Those that stand indented in its docstring."""
    docstring = path.read_text(encoding="utf-8").split('"""')[1]
    for words in commands.commands("\n".join(re.findall(r"^    (.*)$", docstring, re.MULTILINE))):
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
        check_requirement(code)
        for flag in re.findall(r"^--[\w-]+(?=$|[ =])", code):
            assert flag in flags_of_scripts() | FOREIGN_FLAGS, f"no script has {flag}"


@cache
def flags_of_scripts():
    """Names of flags in dataclasses and parsers of all scripts, read without importing them, and of launchers."""
    names = launcher_flags("accelerate") | launcher_flags("torchrun")
    for path in [*REPOSITORY.glob("examples/**/*.py"), *REPOSITORY.glob("benchmarks/*.py")]:
        text = path.read_text(encoding="utf-8")
        names |= {f"--{name}" for name in re.findall(r"^    (\w+): [^=\n]+(?:=|$)", text, re.MULTILINE)}
        names |= set(re.findall(r"add_argument\(\s*\"(--\w+)\"", text))
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
        ("python examples/train_dino.py --num_train_epochs many", "invalid"),
        ("python examples/generate_dataset.py --strategy guess", "invalid choice"),
        ("python examples/no_such_script.py", "There is no examples/no_such_script.py"),
        ("accelerate launch --no_such 2 examples/train_dino.py", "accelerate has no flag --no_such"),
        ("python examples/train_dino.py examples/configs/no_such.yaml", "There is no examples/configs/no_such.yaml"),
        ("cd x && make no-such-target", "no target no-such-target"),
        ('pip install "diffusers-dino[train,no-such]"', "no extra no-such"),
    ],
)
def test_a_wrong_command_is_seen(command, message):
    with pytest.raises(WrongCommandError, match=message):
        check_all(command)


def check_all(code):
    for words in commands.commands(code):
        check_command(words)


def test_a_wrong_config_of_a_page_is_seen():
    (words,) = commands.commands("python examples/generate_dataset.py my_set.yaml")
    check_command(words, {"page.md": "ratio: 5\n"})
    with pytest.raises(WrongCommandError, match="no flag 'ratoi'"):
        check_command(words, {"page.md": "ratoi: 5\n"})


def test_commands_are_taken_apart():
    code = "a --x 'b c' \\\n  d && e | f  # g\nfor i in 1; do h; done\npython - <<'END'\nprint(1)\nEND\n"
    assert [words for words in commands.commands(code) if words] == [
        ["a", "--x", "b c", "d"], ["e"], ["f"], ["for", "i", "in", "1"], ["do", "h"], ["done"], ["python", "-"],
    ]  # fmt: skip
