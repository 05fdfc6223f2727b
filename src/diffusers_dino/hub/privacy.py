"""What may leave this machine: no folder of a user, no DICOM UID, no picture that was not verified to be synthetic."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

__all__ = [
    "Content",
    "check_pictures",
    "check_private",
    "is_hub_id",
    "listed_names",
    "private_traces",
    "without_folders",
]

Content = Path | bytes  # of a file to upload: where it is, or what is in it

# A user's folder on Linux, macOS or Windows; a file URL; a DICOM UID, which has at least six numbers.
_PRIVATE = re.compile(
    r"(?<![\w.])/(?:home|Users|root)/[^\s\"'`|)]+|\b[A-Za-z]:\\+Users\\+[^\s\"'`|)]+|\bfile://[^\s\"'`|)]+|\b[012](?:\.\d+){5,}\b"
)
_PICTURE = re.compile(r"!\[[^\]]*\]\(\s*<?([^)>\s]+)|<img[^>]+?src\s*=\s*[\"']?([^\"'\s>]+)", re.IGNORECASE)


def private_traces(text: str) -> list[str]:
    """The folders of users and the DICOM UIDs in a text; empty if there are none.

    It knows forms, not names: a person has to read what a person has written.
    """
    return sorted({match[0] for match in _PRIVATE.finditer(text)})


def check_private(files: Mapping[str, Content]) -> None:
    """Refuse files whose cards, configs or headers of weights name a user's folder or a DICOM UID, or are damaged."""
    for path, content in files.items():
        if traces := private_traces(_readable(path, content)):
            raise ValueError(
                f"{path} holds what should stay on this machine: {', '.join(traces[:3])}. Remove it first."
            )


def check_pictures(card: str, paths: Iterable[str]) -> None:
    """Refuse a card (Markdown) with a picture that could be of a patient: any but those verified, at `paths`."""
    shown = {match[1] or match[2] for match in _PICTURE.finditer(card)}
    if others := sorted(path for path in shown if path.removeprefix("./") not in set(paths)):
        raise ValueError(
            f"The card shows {others[0][:80]}, which was not verified to be synthetic: remove it. Samples "
            "that are drawn for a card are verified."
        )


def listed_names(names: str | Iterable[str] | None) -> list[str]:
    """One name, several or none as a list; those that are not Hub ids lose their folders, also another machine's."""
    listed = [without_folders(name) for name in ([names] if isinstance(names, str) else names or ())]
    return [name if is_hub_id(name) else PureWindowsPath(name).name for name in listed]


def is_hub_id(name: str) -> bool:
    """Whether a name can be a repository's, `org/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def without_folders(value: Any) -> Any:
    """A local path reduced to its last part, since folder names can tell too much; other values as they are."""
    if not isinstance(value, (str, Path)):
        return value
    text = str(value)
    windows = PureWindowsPath(text)
    local = isinstance(value, Path) or os.path.isabs(text) or windows.drive or text.startswith(("~", ".", "file:"))
    if not local and not (len(text) < 1024 and os.path.exists(text)):
        return value
    return windows.name or text


def _readable(path: str, content: Content) -> str:
    """Text of a card or config, or of the header of weights; empty for pictures and vocabularies."""
    if path.endswith(".safetensors") and isinstance(content, Path):
        try:
            with safe_open(str(content), framework="pt") as file:
                return json.dumps(file.metadata() or {})
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}.") from error
    if path.endswith((".md", "config.json", "model_index.json")):
        return content.decode() if isinstance(content, bytes) else content.read_text()
    return ""
