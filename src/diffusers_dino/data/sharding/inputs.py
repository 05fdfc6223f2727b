"""Where the images of shards come from, and the secret that keeps their names to ourselves."""

from __future__ import annotations

import csv
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from ..sources import Record, Source, open_source
from ..sources.files import is_image
from ..stores.archives import split_name
from .parts import Item

__all__ = ["SALT_VARIABLE", "OpenedSource", "open_sources", "read_salt", "write_key_map"]

SALT_VARIABLE = "DIFFUSERS_DINO_SALT"


@dataclass(frozen=True)
class OpenedSource:
    """A data set, and what it holds."""

    source: Source
    records: Iterable[Record]


def open_sources(texts: list[str]) -> list[OpenedSource]:
    """Open `NAME=FOLDER`, `FILE.yaml=FOLDER` and plain `FOLDER`s, which are named `images`, `images2`, ..."""
    opened: list[OpenedSource] = []
    folders = 0
    for text in texts:
        name, equals, root = text.partition("=")
        if equals:
            found = open_source(name, root)
            opened.append(OpenedSource(found.source, found))
            continue
        folders += 1
        source = Source(f"images{folders if folders > 1 else ''}", image="**/*", title="A folder of images")
        opened.append(OpenedSource(source, list(_folder_records(source.name, Path(text)))))
    names = [one.source.name for one in opened]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"--source names {', '.join(repeated)} twice. A source has one folder.")
    return opened


def _folder_records(name: str, root: Path) -> Iterator[Record]:
    """All images below a folder; `KEY.mask.png` is the mask of the image `KEY`. Each is its own patient."""
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {str(root)!r}. A data set of the catalogue is NAME=FOLDER.")
    empty = True
    for path in root.rglob("*"):
        relative = path.relative_to(root).as_posix()
        key, extension = split_name(relative)
        if extension.startswith("mask.") or not path.is_file() or not is_image(relative):
            continue
        mask = root / f"{key}.mask.png"
        empty = False
        yield Record(name, path, relative, relative, masks=(mask,) if mask.is_file() else ())
    if empty:
        raise FileNotFoundError(f"There is no image in {str(root)!r} nor in its folders.")


def read_salt(file: str | None, output: Path) -> str:
    """The secret that ids are hashed with, from a file (made if new) or the environment; it is never printed."""
    if file is None:
        salt = os.environ.get(SALT_VARIABLE, "").strip()
        if not salt:
            raise ValueError(
                "Ids of patients and images are hashed with a secret. Give --salt_file FILE, which is made if it is "
                f"not there, or set the variable {SALT_VARIABLE}."
            )
        return salt
    path = Path(file).expanduser()
    _check_outside(path, output, "--salt_file")
    if not path.exists():
        with _private_file(path) as written:
            written.write(secrets.token_hex(16) + "\n")
        print(f"Made a new salt: {path}. Keep it, and keep it secret.", flush=True)
    return path.read_text().strip()


def write_key_map(path: Path, items: Iterable[Item], output: Path) -> None:
    """Write which file each key stands for, for its owner's eyes alone."""
    _check_outside(path, output, "--write_key_map")
    with _private_file(path) as file:
        writer = csv.writer(file)
        writer.writerow(["key", "source", "image_id", "patient", "file"])
        for item in items:
            record = item.record
            writer.writerow([item.key, record.source, record.image_id, record.patient, record.image])


def _check_outside(path: Path, output: Path, name: str) -> None:
    if path.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"{name} {path} would be passed on with the shards of {output}. Put it elsewhere.")


def _private_file(path: Path) -> TextIO:
    """Open a file for writing that no other user may read."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", newline="")
