"""The page that leads from the paper to the code: what its tables name exists and is documented."""

import importlib
import inspect
import re

import pytest

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


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:30])
def test_what_a_row_names_exists(row):
    assert codes(row.split(" | ")[1]), "a row says where something is"
    for code in codes(row):
        if code.startswith(("src/", "examples/", "docs/")):
            assert (REPOSITORY / code).exists(), code
        elif re.match(r"diffusers_dino\.", code):
            assert inspect.getdoc(find(code)), f"{code} has no docstring"


def test_a_name_that_is_not_there_is_seen():
    with pytest.raises(AttributeError):
        find("diffusers_dino.embeddings.no_such_function")
