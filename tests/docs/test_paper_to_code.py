"""The page that leads from the paper to the code: what its tables name exists and is documented."""

import importlib
import inspect
import re

import pytest

from commands import parse_as_script
from pages import REPOSITORY

PAGE = REPOSITORY / "docs/paper_to_code.md"
LINES = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
ROWS = [line for line in LINES if not line.startswith(("| ---", "| in the paper"))]


def codes(row):
    return re.findall(r"`([^`]+)`", row)


def find(name):
    """The object of a dotted name, wherever its module ends."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def test_the_page_covers_the_paper():
    text = PAGE.read_text(encoding="utf-8")
    for part in (
        "2.1",
        "2.2",
        "2.3",
        "2.4",
        "2.5",
        "A.1",
        "Table 1",
        "Table 2",
        "Fig. 3",
        "Fig. 4",
        "Fig. 6",
        "Fig. 7",
    ):
        assert part in text
    assert len(ROWS) > 25


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:30])
def test_what_a_row_names_exists(row):
    assert codes(row.split(" | ")[1]), "a row says where something is"
    for code in codes(row):
        if code.startswith(("src/", "examples/", "docs/")):
            assert (REPOSITORY / code).exists(), code
        elif re.match(r"(diffusers_dino|sources|protocols|plots)\.", code):
            assert inspect.getdoc(find(code)), f"{code} has no docstring"


def knows(script, flag):
    problem = parse_as_script(REPOSITORY / script, [flag]) or ""
    return "unknown" not in problem and "there is no flag" not in problem  # that a value is missing is another matter


@pytest.mark.parametrize("row", [row for row in ROWS if "`--" in row], ids=lambda row: row[2:30])
def test_the_flags_of_a_row_are_those_of_its_script(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scripts = [code for code in codes(row) if re.fullmatch(r"examples/\w+\.py", code)] or ["examples/train_dino.py"]
    for flag in (code.split()[0] for code in codes(row) if code.startswith("--")):
        assert any(knows(script, flag) for script in scripts), flag


def test_a_flag_and_a_name_that_are_not_there_are_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert knows("examples/train_dino.py", "--rank")
    assert not knows("examples/train_dino.py", "--no_such_flag")
    with pytest.raises(AttributeError):
        find("diffusers_dino.embeddings.no_such_function")
