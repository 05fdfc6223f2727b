"""One image of a provider, as its label files describe it: where it is and what is known of it. No pixel is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..images.reading import RawLayout

__all__ = ["Record"]


@dataclass(frozen=True, slots=True)
class Record:
    """One image and what its provider says of it.

    Attributes:
        source: Name of the data set in the catalogue, such as `"padchest"`.
        image: The file.
        image_id: The provider's name of the image, unique within the source; may hold dots and slashes.
        patient: The provider's patient id, **as it is**: whoever writes it anywhere hashes it first. Where there is
            none, the image's own id.
        labels: Findings that are stated as present. An empty tuple: looked at, and none present. None: unlabelled.
        uncertain: Findings that the provider marks as uncertain; they are not in `labels`.
        view: `"PA"`, `"AP"`, `"LATERAL"`, or the provider's own word where it is none of them; None if unknown.
        split: The official split: `"train"`, `"validation"` or `"test"`; None where the provider has none.
        masks: Files whose foreground together is the segmentation mask, such as the left and the right lung; they
            have the image's size unless `Source.notes` says otherwise. Empty: no mask.
        raw: How to read a file without a header; None: the file says it itself.
        invert: Whether bone is dark in the file and the values must be turned over. None: as the file's header says.
    """

    source: str
    image: Path
    image_id: str
    patient: str
    labels: tuple[str, ...] | None = None
    uncertain: tuple[str, ...] = ()
    view: str | None = None
    split: str | None = None
    masks: tuple[Path, ...] = ()
    raw: RawLayout | None = None
    invert: bool | None = None
