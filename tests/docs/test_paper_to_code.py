"""The page that leads from the paper to the code: what its tables name exists and is documented."""

import inspect
import re
from pkgutil import resolve_name

import pytest

from pages import REPOSITORY

PAGE = REPOSITORY / "docs/paper_to_code.md"
LINES = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
ROWS = [line for line in LINES if not line.startswith(("|---", "| in the paper"))]


def codes(row):
    return re.findall(r"`([^`]+)`", row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:30])
def test_what_a_row_names_exists(row):
    assert codes(row.split(" | ")[1]), "a row says where something is"
    for code in codes(row):
        if code.startswith(("src/", "examples/", "docs/")):
            assert (REPOSITORY / code).exists(), code
        elif re.match(r"diffusers_dino\.", code):
            assert inspect.getdoc(resolve_name(code)), f"{code} has no docstring"
