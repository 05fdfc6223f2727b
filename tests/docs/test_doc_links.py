"""Links of README, documentation and docstrings lead somewhere; those to the web agree with the bibliography."""

import ast
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from diffusers_dino.hub.cards import _CITATIONS
from pages import REPOSITORY, anchors, blocks, links, name_of, pages

SITE = REPOSITORY / "docs"
MODULES = sorted([*REPOSITORY.glob("src/**/*.py"), *REPOSITORY.glob("examples/**/*.py")])
SOURCES = [REPOSITORY / folder for folder in ("src", "examples", "benchmarks", ".github")]
WITHOUT_TLS = {"db.jsrt.or.jp"}
ARXIV = re.compile(r"arxiv\.org/(?:abs|pdf)/(\d{4}\.\d{4,5})$")
DOI = re.compile(r"doi\.org/(10\.\d{4,9}/\S+)$")


def problem_of(link: str, page: Path) -> str | None:
    """What is wrong with a relative link, or None."""
    path, _, fragment = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return f"{link}: there is no such file"
    if SITE in page.parents and not target.is_relative_to(SITE):
        return f"{link}: leads out of the site"
    if fragment and not all(fragment in names for names in anchors(target)):
        return f"{link}: {name_of(target)} has no such heading, on GitHub and on the site alike"
    return None


def is_external(link: str) -> bool:
    return bool(urlsplit(link).scheme)


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_the_links_of_a_page_lead_somewhere(page):
    problems = [problem_of(link, page) for link in links(page) if not is_external(link)]
    assert not [problem for problem in problems if problem]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a](no_such.md)", "no such file"),
        ("[a](training.md#no-such-heading)", "no such heading"),
        ("[a](../README.md)", "out of the site"),
        ("![a](images/no_such.png)", "no such file"),
        ("[a][b]\n\n[b]: no_such.md", "no such file"),
        ("[a](#other)", "no such heading"),
    ],
)
def test_a_dead_link_is_seen(text, message, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "SITE", tmp_path / "docs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# Top\n")
    (tmp_path / "docs/training.md").write_text("# Training\n")
    page = tmp_path / "docs/page.md"
    page.write_text(f"# Page\n\n[fine](training.md#training) `[code](nowhere.md)`\n\n{text}\n")
    (problem,) = [found for link in links(page) if (found := problem_of(link, page))]
    assert message in problem


def test_anchors_are_those_of_github_and_of_the_site(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `code.py` & more\n\n## Twice\n\n```text\n# no heading\n```\n\n## Twice\n\n## Fréchet: [it](x.md)\n"
    )
    github, site = anchors(page)
    assert github == {"a-codepy--more", "twice", "twice-1", "fréchet-it"}
    assert site == {"a-codepy-more", "twice", "twice_1", "frechet-it"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_links_of_docstrings_lead_somewhere(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for link in re.findall(r"\]\(([^)\s]+)\)", ast.get_docstring(node) or ""):
                assert link.startswith("https://"), f"{link}: a docstring is read in several places: give the address"


def test_pages_that_code_mentions_exist():
    mentions = 0
    for path in (path for folder in SOURCES for path in folder.rglob("*")):
        if path.suffix not in {".py", ".yaml", ".yml", ".md", ".sh", ".ipynb"}:
            continue
        for name in re.findall(r"\bdocs/[\w/]+\.md", path.read_text(encoding="utf-8")):
            assert (REPOSITORY / name).is_file(), f"{name_of(path)} mentions {name}"
            mentions += 1
    assert mentions > 10


def test_each_page_is_in_the_navigation():
    config = yaml.load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), Loader=Tolerant)
    listed = sorted(leaves(config["nav"]))
    assert listed == sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.md"))


def test_a_dead_link_fails_the_build_of_the_site():
    """`make docs` builds with --strict, which makes an error of each warning."""
    config = yaml.load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), Loader=Tolerant)
    kinds = {"not_found", "anchors", "absolute_links", "unrecognized_links"}
    assert dict.fromkeys(kinds, "warn") == config["validation"]["links"]
    assert "mkdocs build --strict" in (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert config["theme"]["font"] is False  # nothing is fetched by who reads the site


class Tolerant(yaml.SafeLoader):
    """mkdocs.yml names Python objects, which matter to mkdocs alone."""


Tolerant.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def leaves(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [leaf for child in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(child)]


def external_links() -> dict[str, set[str]]:
    """Each address, with the pages and modules that give it."""
    found: dict[str, set[str]] = {}
    for page in pages():
        for link in links(page):
            if is_external(link):
                found.setdefault(link, set()).add(name_of(page))
    for path in MODULES:
        for link in re.findall(r"https?://[^\s)\"'>\]`]+", path.read_text(encoding="utf-8")):
            found.setdefault(link.rstrip(".,;:"), set()).add(name_of(path))
    return found


def test_links_to_the_web_are_well_formed():
    found = external_links()
    assert len(found) > 20
    for link, where in found.items():
        parts = urlsplit(link)
        local = parts.hostname in {"127.0.0.1", "localhost"}
        assert parts.scheme == "https" or local or parts.hostname in WITHOUT_TLS, f"{link} in {where}"
        assert local or re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.hostname or ""), f"{link} in {where}"
        assert not re.search(r"[<>{}|\\^\s]", link), f"{link} in {where}"
        if "arxiv.org" in link:
            assert ARXIV.search(link), f"{link} in {where} is no arXiv address"
        if "doi.org" in link:
            assert DOI.search(link), f"{link} in {where} is no DOI"


def test_arxiv_numbers_of_texts_are_the_links_numbers():
    """`[arXiv 2407.11594](https://arxiv.org/abs/2407.11594)`: text and address name one paper."""
    seen = 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for said, linked in re.findall(
            r"\[[^\]]*?arXiv[: ](\d{4}\.\d+)[^\]]*\]\(https://arxiv\.org/abs/([^)]+)\)", text
        ):
            assert said == linked, name_of(page)
            seen += 1
    assert seen


def bibliography() -> dict[str, dict[str, str]]:
    """Fields of each entry of the cards' bibliography, by its key."""
    return {key: fields for text in _CITATIONS.values() for key, fields in entries(text).items()}


def entries(text: str) -> dict[str, dict[str, str]]:
    """Fields of BibTeX entries, spaces and braces aside."""
    found = {}
    for key, body in re.findall(r"@\w+\{([^,]+),(.*?)\n\}", text, re.DOTALL):
        fields = re.findall(r"^\s*(\w+)\s*=\s*(.+?),?$(?=\s*\w+\s*=|\s*\Z)", body, re.DOTALL | re.MULTILINE)
        found[key] = {name: " ".join(re.sub(r"[{}]", "", value).split()) for name, value in fields}
    return found


def test_citations_of_pages_are_those_of_the_cards():
    known, seen = bibliography(), set()
    assert all({"title", "author", "year"} <= set(fields) for fields in known.values())
    for page in pages():
        for block in blocks(page, "bibtex"):
            for key, fields in entries(block.code).items():
                assert fields == known[key], f"{key} in {block}"
                seen.add(key)
    assert {"jimenezperez2024dinodiffusion", "tian2024diffuse"} <= seen
