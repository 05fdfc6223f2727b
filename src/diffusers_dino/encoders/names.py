"""What to call each of several encoders, and which of them are meant."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence

__all__ = ["choose_encoders", "name_encoders"]


def name_encoders(sources: Sequence[str]) -> list[str]:
    """The last part of each encoder's source; several of one name are numbered from the second."""
    names: list[str] = []
    met: Counter[str] = Counter()
    for source in sources:
        name = source.rstrip("/").rpartition("/")[2]
        met[name] += 1
        names.append(name if met[name] == 1 else f"{name}-{met[name]}")
    return names


def choose_encoders(sources: Sequence[str], wanted: Sequence[str] | None) -> list[bool]:
    """Of each encoder, whether it is wanted, by its name or its source; None wants all.

    A ValueError that helps with a name that is not there, and of an empty choice.
    """
    if wanted is None:
        return [True] * len(sources)
    if isinstance(wanted, str):
        raise TypeError(f"`encoders` is a list of names: give [{wanted!r}].")
    names = name_encoders(sources)
    known = {source: name for source, name in zip(sources, names, strict=True) if sources.count(source) == 1}
    known |= {name: name for name in names}
    if not len(wanted):
        raise ValueError(f"`encoders` is empty: give at least one of {names}, or None for all.")
    for name in wanted:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise ValueError(f"There is no encoder {name!r} here: did you mean {close[0]!r}? There are {names}.")
    chosen = {known[name] for name in wanted}
    return [name in chosen for name in names]
