"""The Python code of README and documentation runs, and the messages that pages explain are those that are raised."""

import traceback

import pytest
import torch

import tiny
from pages import REPOSITORY, Block, blocks, name_of, pages

LANGUAGES = {"python", "bash", "yaml", "json", "text", "bibtex"}
# Its blocks upload and download: `tests/test_hub_publish.py` runs them against a Hub on loopback.
RUN_ELSEWHERE = {"docs/publish.md"}
PAGES = [page for page in pages() if name_of(page) not in RUN_ELSEWHERE and any(blocks(page, "python"))]
EXAMPLES = [path for path in sorted(REPOSITORY.glob("src/**/pipeline_*.py")) if any(blocks(path, "python"))]


def run_code(page):
    """The names that the code of a page leaves, run from top to bottom."""
    names = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        run_block(block, names)
    return names


def run_block(block: Block, names: dict):
    source = "\n" * (block.line - 1) + block.code  # tracebacks name the page's own lines
    exec(compile(source, name_of(block.page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_code_of_a_page_runs(page, folder, capsys):
    names = run_code(page)
    names["printed"] = capsys.readouterr().out
    CHECKS.get(name_of(page), lambda names: None)(names)


@pytest.mark.parametrize("path", EXAMPLES, ids=name_of)
def test_the_example_of_a_docstring_runs(path, folder):
    run_code(path)


def check_readme(names):
    assert len(names["variations"]) == 4
    assert len(names["more"]) == 1


def check_diffusion(names):
    assert len(names["variations"]) == 4
    assert len(names["sources"]) == 8
    assert names["embeds"].shape == (1, 5, tiny.TOKEN_DIM)
    assert torch.is_tensor(names["embeds"])


def check_interpolation(names):
    assert len(names["path"]) == 5
    assert len(names["paths"]) == 12
    assert names["sheet"].size == (6 * tiny.IMAGE_SIZE, 3 * tiny.IMAGE_SIZE)
    assert len(names["mixtures"]) == 3
    assert names["label"] <= {"Effusion", "Nodule", "No Finding"}


def check_segmentation(names):
    assert names["masks"].shape == names["baseline"].shape == (1, 128, 128)
    assert names["swept"].masks.shape == (1, 128, 128)
    assert names["sides"] == [4, 8]


def check_sources(names):
    assert "1_a.png p1 () PA None" in names["printed"]
    assert "nih_chest_xray14 and siim_ptx may hold the same images" in names["printed"]


def check_metrics(names):
    # a reference that was kept as statistics gives the distance that its features give
    distance = names["frechet_distance"](names["generated"], names["real"])
    statistics = names["GaussianStatistics"].load("reference.safetensors")
    assert names["frechet_distance"](names["generated"], statistics) == pytest.approx(distance, rel=1e-6)


def check_gate(names):
    assert names["passed"].tolist() == [True] * 4  # static is no copy of a phantom
    assert not names["gate"](names["training_images"][0]["image"][None]).any()


# What the names that a page leaves must hold, beyond that its code ran
CHECKS = {
    "README.md": check_readme,
    "docs/pipelines/dino_diffusion.md": check_diffusion,
    "docs/pipelines/dino_interpolation.md": check_interpolation,
    "docs/pipelines/diffseg.md": check_segmentation,
    "docs/memorization.md": check_gate,
    "docs/metrics.md": check_metrics,
    "docs/sources.md": check_sources,
}


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_each_block_says_its_language(page):
    """A block in no language, or in one that no test reads, could say anything."""
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block} is of the language {block.language!r}"
    assert page.read_text(encoding="utf-8").count("\n```") == 2 * len(list(blocks(page))), "a fence is not closed"


def test_a_block_that_fails_is_named_with_its_page_and_line(tmp_path, folder):
    page = tmp_path / "broken.md"
    page.write_text("# Page\n\n```python\nvalue = 1\n```\n\nText\n\n```python\nvalue += 1\nvalue.no_such_name\n```\n")
    with pytest.raises(AttributeError, match="no_such_name") as caught:
        run_code(page)
    last = traceback.extract_tb(caught.tb)[-1]
    assert (last.filename, last.lineno) == ("broken.md", 11)


def test_names_are_shared_within_a_page(tmp_path, folder):
    page = tmp_path / "whole.md"
    page.write_text("```python\nvalue = 1\n```\n\n- in a list\n\n    ```python\n    value += 1\n    ```\n")
    assert run_code(page)["value"] == 2
