"""Commands that measure a model or a synthetic set."""

from __future__ import annotations

from pathlib import Path

__all__ = ["read_keys"]


def read_keys(path: str) -> list[str]:
    """The keys of a text file, one a line."""
    return Path(path).read_text().split()
