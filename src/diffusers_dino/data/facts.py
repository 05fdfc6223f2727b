"""What is stored beside an image in `KEY.json`, as shards have it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .keys import respell
from .sources.fields import is_blank

if TYPE_CHECKING:
    from .datasets import ImageDataset
    from .stores.store import ImageStore

__all__ = ["facts_beside", "patient_in"]


def facts_beside(images: ImageDataset | ImageStore, place: int) -> dict[str, Any]:
    """The facts beside an image; `KeyError` if there are none, `ValueError`, which names it, if they are damaged."""
    content = images.companion(place, "json")
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The facts of image {images.keys[place]!r} are damaged: {error}.") from error
    if not isinstance(facts, dict):
        raise ValueError(f"The facts of image {images.keys[place]!r} are damaged: they are not a JSON object.")
    return facts


def patient_in(facts: dict[str, Any]) -> str | None:
    """Whose the image is, if its facts say so; patients `1` and `1.0` are one, as in tables."""
    patient = str(facts.get("patient"))
    return None if is_blank(patient) else respell(patient)
