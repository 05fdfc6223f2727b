"""The documentation as text: its pages, and the code, headings and links in them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
_FENCE = re.compile(r"^( *)(`{3,})(\S*)[^\n]*\n(.*?)^\1\2 *$", re.DOTALL | re.MULTILINE)
_INLINE_CODE = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_REFERENCE = re.compile(r"^\s*\[[^\]]+\]:\s+(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced piece of code, `line` being the line of its page that it begins in."""

    page: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def pages() -> list[Path]:
    """Everything that a reader of the repository or of the site reads."""
    found = [REPOSITORY / "README.md", *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("examples/**/*.md")]
    return sorted([*found, *REPOSITORY.glob(".github/*.md")])


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY)) if page.is_relative_to(REPOSITORY) else page.name


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    """The fenced blocks of a page in their order, those of some languages or all."""
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        if not languages or match[3] in languages:
            line = text.count("\n", 0, match.start(4)) + 1
            yield Block(page, line, match[3], textwrap.dedent(match[4]))


def inline_code(page: Path) -> list[str]:
    """What stands between backticks, fenced blocks aside."""
    return [" ".join(match[2].split()) for match in _INLINE_CODE.finditer(without_blocks(page))]


def without_blocks(page: Path) -> str:
    return _FENCE.sub("\n", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures."""
    text = _INLINE_CODE.sub("`code`", without_blocks(page))
    return [*_LINK.findall(text), *_REFERENCE.findall(text)]
