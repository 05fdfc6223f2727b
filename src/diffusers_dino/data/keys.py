"""Keys of images in text files and tables, and which image each of them means."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..files import read_regular
from .stores.folder import image_key

__all__ = ["UnknownKeyError", "find_keys", "match_keys", "match_paths", "read_keys", "respell", "unify"]


class UnknownKeyError(KeyError, ValueError):
    """Keys that are not there. What a user can mend is a `ValueError`, too, and is told without a traceback."""

    def __str__(self) -> str:
        return str(self.args[0])


def read_keys(path: str | Path) -> list[str]:
    """The keys of a text file, one a line, without repeats. They may hold spaces; blank lines are left out.

    UTF-8, or UTF-16 with a byte order mark. ValueError if the file is something else, or holds no key.
    """
    content = read_regular(path)
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error}): save it as UTF-8, one key a line.") from error
    keys = list(dict.fromkeys(line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()))
    if not keys:
        raise ValueError(f"{path} holds no key: write one a line.")
    return keys


def match_keys(wanted: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """For each wanted key its place in `known`; None where it is not there.

    A key that is not there letter by letter may be spelt in another way: `\\` for `/`, with an image's extension,
    with `./` or spaces around it, `1.0` for `1`, or with accents composed otherwise. That counts only where it leads
    from one wanted key to one known key.
    """
    place_of = {key: place for place, key in enumerate(known)}
    places = [place_of.get(key) for key in wanted]
    lost = list(dict.fromkeys(key for key, place in zip(wanted, places, strict=True) if place is None))
    if not lost:
        return places
    found = set(places)
    forms = [(_form(key), place) for key, place in place_of.items() if place not in found]
    once = {form for form, count in Counter(form for form, _ in forms).items() if count == 1}
    place_of_form = {form: place for form, place in forms if form in once}
    asked = Counter(map(_form, lost))
    other = {key: place_of_form.get(_form(key)) for key in lost if asked[_form(key)] == 1}
    return [other.get(key) if place is None else place for key, place in zip(wanted, places, strict=True)]


def find_keys(wanted: Sequence[str], known: Sequence[str], complaint: str) -> list[int]:
    """`match_keys`, or an UnknownKeyError: how many are missing, a complaint, the first few, and what may be meant."""
    places = match_keys(wanted, known)
    missing = [key for key, place in zip(wanted, places, strict=True) if place is None]
    if missing:
        raise UnknownKeyError(f"{len(missing)} {complaint}, such as {', '.join(missing[:3])}{_hint(missing, known)}")
    return [place for place in places if place is not None]


def match_paths(wanted: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """As `match_keys`, but a wanted key may also have more folders before it, or fewer: a path, or a file's name.

    ValueError if such a one may be several known keys: what it means must not be guessed.
    """
    places = match_keys(wanted, known)
    if None not in places:
        return places
    whole: dict[str, list[int]] = {}  # by known keys, and by all ends of them
    ends: dict[str, list[int]] = {}
    for place, key in enumerate(known):
        whole.setdefault(_form(key), []).append(place)
        for end in _ends(key):
            ends.setdefault(end, []).append(place)
    for number, key in enumerate(wanted):
        if places[number] is not None:
            continue
        found = next((whole[end] for end in _ends(key) if end in whole), None) or ends.get(_form(key), [])
        if len(found) > 1:
            meant = " or ".join(repr(known[place]) for place in found[:2])
            raise ValueError(
                f"{key!r} may be {len(found)} of the images, such as {meant}: give keys with their folders."
            )
        places[number] = next(iter(found), None)
    return places


def _ends(key: str) -> list[str]:
    """A key as `_form` has it, then without its first folder, without its first two, and so on."""
    parts = _form(key).split("/")
    return ["/".join(parts[first:]) for first in range(len(parts))]


def _hint(missing: Iterable[str], known: Sequence[str]) -> str:
    """Keys that a missing one resembles: of the same file name, apart from capitals and zeros before a number."""
    by_name: dict[str, list[str]] = {}
    for key in known:
        by_name.setdefault(_name(key), []).append(key)
    for key in missing:
        if alike := by_name.get(_name(key)):
            return f" (is {' or '.join(map(repr, alike[:3]))} meant by {key!r}?)"
    return ""


def respell(text: str) -> str:
    """A path or an id in the spelling that others are compared in: `/`, composed accents, `1` for `1.0`, no spaces."""
    text = unicodedata.normalize("NFC", text).strip().replace("\\", "/")
    text = re.sub(r"^(\./)+", "", text)
    return text.partition(".")[0] if re.fullmatch(r"\d+\.0+", text) else text


def unify(names: Sequence[str]) -> list[str]:
    """The names, of which those that differ only in spelling get the first one's: patients `1` and `1.0` are one."""
    first: dict[str, str] = {}
    return [first.setdefault(respell(name), name) for name in names]


def _form(key: str) -> str:
    """What different spellings of a key have in common."""
    return respell(image_key(respell(key)))


def _name(key: str) -> str:
    return _form(key).rpartition("/")[2].casefold().lstrip("0")
