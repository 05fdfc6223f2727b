"""docs/sources.md says what the catalogue says, and its examples are the ones that are tested."""

import re
from pathlib import Path

from diffusers_dino.data.sources import Source, catalogue_page
from diffusers_dino.data.sources.description import Table
from diffusers_dino.data.sources.fields import LabelRule

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "sources.md").read_text(encoding="utf-8")


def test_the_page_is_the_catalogue():
    assert catalogue_page() in PAGE, (
        "docs/sources.md is not the catalogue any more: replace its end by what "
        '`python -c "from diffusers_dino.data.sources import catalogue_page; print(catalogue_page())"` prints'
    )


def test_the_example_of_the_page_is_the_file_that_is_tested():
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert example == (REPOSITORY / "examples/configs/sources/mammograms.yaml").read_text(encoding="utf-8")


def test_the_keys_of_the_page_exist():
    table = PAGE.split("| key | says |")[1].split("\n\n")[0]
    known = {*Source.__dataclass_fields__, *Table.__dataclass_fields__, *LabelRule.__dataclass_fields__}
    keys = {word for line in table.splitlines()[2:] for word in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert keys
    assert keys <= known
