"""The documentation: its links and citations lead to what they name."""

import re

import pytest

from pages import REPOSITORY, blocks, links, name_of, pages

SITE = REPOSITORY / "docs"
OUTSIDE = [page for page in pages() if SITE not in page.parents]  # which mkdocs does not read


@pytest.mark.parametrize("page", OUTSIDE, ids=name_of)
def test_the_links_of_a_page_outside_the_site_lead_somewhere(page):
    targets = [link.partition("#")[0] for link in links(page) if "://" not in link]
    assert not [path for path in targets if path and not (page.parent / path).exists()]


def test_pages_that_code_mentions_exist():
    sources = [
        path for folder in ("src", "examples", "benchmarks", ".github") for path in (REPOSITORY / folder).rglob("*")
    ]
    texts = {
        path: path.read_text(encoding="utf-8") for path in sources if path.suffix in {".py", ".yaml", ".yml", ".md"}
    }
    mentions = [(path, name) for path, text in texts.items() for name in re.findall(r"\bdocs/[\w/]+\.md", text)]
    assert mentions
    assert not [(str(path), name) for path, name in mentions if not (REPOSITORY / name).is_file()]


def test_citations_of_pages_are_those_of_the_cards():
    bibliography = " ".join((REPOSITORY / "src/diffusers_dino/hub/citations.bib").read_text(encoding="utf-8").split())
    found = [block for page in pages() for block in blocks(page, "bibtex")]
    assert found
    for block in found:
        for entry in re.findall(r"@\w+\{.*?\n\}", block.code, re.DOTALL):
            assert " ".join(entry.split()) in bibliography, block
