"""Local weight files and their hashes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from ...files import atomic_write, read_json, read_regular, sha256_of

__all__ = ["checked_sha256", "folder_sha256", "read_config", "require_local", "write_sha256"]

_SIDECAR = ".sha256"  # beside a weight file: what `sha256sum FILE` prints


def checked_sha256(path: Path, expected: str | None = None) -> str:
    """SHA-256 of a weight file; ValueError unless it is the one expected and that of a `FILE.sha256` beside it."""
    found = sha256_of(path)
    sidecar = path.with_name(path.name + _SIDECAR)
    if sidecar.is_file():
        words = read_regular(sidecar, limit=1 << 16).decode("utf-8", "replace").split(maxsplit=1)
        _require(path, found, words[0] if words else "nothing", f"{sidecar.name} says")
    if expected is not None:
        _require(path, found, expected.lower(), "asked for is")
    return found


def write_sha256(path: Path) -> str:
    """Write the SHA-256 of a weight file beside it, for `checked_sha256`, and return it."""
    found = sha256_of(path)
    with atomic_write(path.with_name(path.name + _SIDECAR)) as file:
        file.write(f"{found}  {path.name}\n".encode())
    return found


def folder_sha256(folder: Path, expected: str | None = None) -> str:
    """SHA-256 of a checkpoint's weights: of `model.safetensors`, or of the list of hashes of its several files."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return checked_sha256(files[0], expected)
    listed = "".join(f"{checked_sha256(file)}  {file.name}\n" for file in files)
    found = hashlib.sha256(listed.encode()).hexdigest()
    if expected is not None:
        _require(folder, found, expected.lower(), "asked for is")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint; ValueError if it is damaged."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("architecture", ""), str):
        raise ValueError(f"{folder / 'config.json'} is not the configuration of a model.")
    return config


def require_local(name: str, weights: str | os.PathLike[str] | None, hint: str) -> Path:
    """The path of weights; ValueError if none are given, FileNotFoundError if they do not exist here."""
    if weights is None:
        raise ValueError(
            f"The extractor {name} needs its weights (`weights`) from this machine, nothing is downloaded: {hint}"
        )
    path = Path(weights)
    if not (path.is_file() or path.is_dir()):  # nor a pipe or a device, which nobody could finish to read
        raise FileNotFoundError(f"There are no weights {path} for the extractor {name}: {hint}")
    return path


def _require(path: Path, found: str, expected: str, who: str) -> None:
    if found != expected:
        raise ValueError(
            f"The weights {path} have the SHA-256 {found}, {who} {expected}: the file is another one or damaged. "
            "Fetch it again, or, if the change is meant, give the new hash."
        )
