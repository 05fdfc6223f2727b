"""The Python code of the documentation runs, with few denoising steps."""

import re

import pytest

from pages import REPOSITORY, blocks, name_of, pages

LANGUAGES = {"python", "bash", "yaml", "json", "text", "bibtex", "mermaid"}
# The one's blocks upload and download: `tests/test_hub_publish.py` runs them against a Hub on loopback. Those of the
# other are run by `tests/run_wheel.py`, with the wheel.
RUN_ELSEWHERE = {"docs/publish.md", "README.md"}
PAGES = [page for page in pages() if name_of(page) not in RUN_ELSEWHERE and any(blocks(page, "python"))]
EXAMPLES = [path for path in sorted(REPOSITORY.glob("src/**/pipeline_*.py")) if any(blocks(path, "python"))]
STEPS = re.compile(r'(?<=num_inference_steps)("?[=:] ?)\d+')


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=name_of)
def test_the_code_of_a_page_or_a_docstring_runs(page, folder, monkeypatch):
    for name in ("diffusion", "interpolation"):
        module = f"diffusers_dino.pipelines.pipeline_dino_{name}"
        monkeypatch.setattr(f"{module}.default_steps", lambda scheduler, given=None: given or 2)
    names = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        source = "\n" * (block.line - 1) + STEPS.sub(r"\g<1>2", block.code)  # tracebacks name the page's own lines
        exec(compile(source, name_of(page), "exec"), names)


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_each_block_says_its_language(page):
    """A block in no language, or in one that no test reads, could say anything."""
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block} is of the language {block.language!r}"
    assert page.read_text(encoding="utf-8").count("\n```") == 2 * len(list(blocks(page))), "a fence is not closed"
