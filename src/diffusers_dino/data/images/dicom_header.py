"""The header of a DICOM file, of which almost nothing is handed on.

A header is full of names, dates and free text, also in fields that are for something else. So only needed fields are
looked at, as bytes; `dicom_facts` checks what it gives; and pydicom, whose warnings quote values, is kept silent.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import logging
import math
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...extras import require
from .errors import UnreadableImageError

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = [
    "PixelField",
    "decimals",
    "dicom_facts",
    "integers",
    "is_dicom",
    "items",
    "parse_dicom",
    "salted_hash",
    "text",
]

_MODALITY, _VIEW, _IMAGE_LATERALITY, _LATERALITY = 0x00080060, 0x00185101, 0x00200062, 0x00200060
_PATIENT, _STUDY = 0x00100020, 0x0020000D
_SPACINGS = (0x00280030, 0x00181164)  # in the patient; else at the detector
_MEDIA_CLASS, _CLASS, _TRANSFER_SYNTAX, _PIXELS = 0x00020002, 0x00080016, 0x00020010, 0x7FE00010
_IMPLICIT, _EXPLICIT, _BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
_DEFLATED, _RLE = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"
_UNDEFINED, _ITEM, _SEQUENCE_END = 0xFFFFFFFF, b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_CUT = "the file is cut short: it ends"

# Defined terms of PS3.3 (C.7.3.1.1.1, C.8.1.1, C.8.11.5) and what is written in their place.
_MODALITIES = (
    *("CR", "CT", "DG", "DR", "DX", "ES", "GM", "IO", "MG", "MR", "NM", "OP", "OT", "PT", "PX", "RF", "RG", "RTIMAGE"),
    *("SC", "SM", "TG", "US", "XA", "XC"),
)
_LATERAL_VIEWS = ("LL", "RL", "LAT", "LATERAL")
_OTHER_VIEWS = ("AP", "PA", "LLD", "RLD", "LLO", "RLO")
_LATERALITIES = ("L", "R", "B", "U")
_LARGEST_SPACING = 10.0  # mm
# Of the first fields of a header.
_TYPES = (b"UL", b"CS", b"UI", b"SH", b"LO", b"OB", b"DA", b"TM", b"DT", b"AE", b"UN", b"IS")

_quiet_lock = threading.Lock()


def is_dicom(start: bytes) -> bool:
    """Whether a file that begins with these 132 bytes (or more) is a DICOM file, be it one without a preamble."""
    return start[128:132] == b"DICM" or _layout_of(start) is not None


def _layout_of(start: bytes) -> tuple[bool, str] | None:
    """How fields are written if these bytes begin with two of a header: without types? in which byte order?"""
    for order in ("little", "big"):
        group, element, place = *_tag(start, 0, order), 8
        if group not in (2, 8) or element > 0x18:
            continue
        implicit = start[4:6] not in _TYPES
        if implicit:
            length = int.from_bytes(start[4:8], order)
        elif start[4:6] in (b"OB", b"UN"):
            length, place = int.from_bytes(start[8:12], order), 12
        else:
            length = int.from_bytes(start[6:8], order)
        following = _tag(start, place + length, order)
        if length % 2 == 0 and following[0] in (group, 8) and following > (group, element):
            return implicit, order
    return None


def _tag(data: bytes, place: int, order: str) -> tuple[int, int]:
    group, element = (int.from_bytes(data[place + i : place + i + 2], order) for i in (0, 2))
    return group, element


def dicom_facts(source: str | PathLike[str] | bytes | Dataset, salt: str | bytes | None = None) -> dict[str, Any]:
    """What may be told of a DICOM file. A field that is missing, or holds anything unexpected, is left out.

    Args:
        source: A path, the bytes of a file, or a pydicom `Dataset`.
        salt: Secret of `salted_hash`; without it, no ids.

    Returns:
        `modality` (a defined term such as `"DX"`), `view` (`"PA"`, `"AP"`, `"LATERAL"`, decubitus or oblique ones),
        `laterality` (`"L"`, `"R"`, `"B"`, `"U"`), `spacing` (mm between rows, between columns; rounded to 0.0001) and,
        with a salt, `patient` and `study` (hashes).

    Raises:
        UnreadableImageError: If the file is damaged or not DICOM.
    """
    if isinstance(source, str | PathLike):
        source = Path(source).read_bytes()
    dataset = parse_dicom(source, [])[1] if isinstance(source, bytes) else source
    modality, view = text(dataset, _MODALITY), text(dataset, _VIEW)
    laterality = text(dataset, _IMAGE_LATERALITY) or text(dataset, _LATERALITY)
    facts: dict[str, Any] = {
        "modality": modality if modality in _MODALITIES else None,
        "view": "LATERAL" if view in _LATERAL_VIEWS else view if view in _OTHER_VIEWS else None,
        "laterality": laterality if laterality in _LATERALITIES else None,
        "spacing": next(filter(None, (_spacing(dataset, tag) for tag in _SPACINGS)), None),
    }
    if salt is not None:
        for name, tag in (("patient", _PATIENT), ("study", _STUDY)):
            identifier = text(dataset, tag)
            facts[name] = salted_hash(identifier, salt) if identifier else None
    return {name: value for name, value in facts.items() if value is not None}


def salted_hash(identifier: str, salt: str | bytes) -> str:
    """A name of 16 hexadecimal digits for a patient or a study that cannot be traced back without the salt.

    HMAC-SHA256 with the salt as key, cut to 64 bits: two of a million ids coincide with probability 3e-8. The
    same id and salt give the same name, so files of one patient stay together. Whoever has the salt can try all ids:
    keep it secret, and never publish it.

    Args:
        identifier: The id, not empty; space around it is ignored.
        salt: A secret of at least 16 bytes, such as `secrets.token_hex(16)`; `ValueError` if it is shorter.
    """
    key = salt.encode() if isinstance(salt, str) else salt
    if len(key) < 16:
        raise ValueError(f"The salt must have at least 16 bytes, got {len(key)}. `secrets.token_hex(16)` makes one.")
    if not identifier.strip():
        raise ValueError("The identifier to hash is empty.")
    return hmac.new(key, identifier.strip().encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()[:16]


class PixelField(NamedTuple):
    """The pixels as they lie in a file: its one value or, if they are compressed, the fragments behind the table.

    `frames` is how many frames the table of offsets names, 0 if it is empty.
    """

    type: str
    value: bytes
    fragments: list[bytes]
    frames: int = 0


def parse_dicom(
    data: bytes, tags: list[int], most_bytes: int = 2**30, pixels: bool = False
) -> tuple[str, Dataset, PixelField | None]:
    """The transfer syntax, a data set of the fields `tags` and those of `dicom_facts`, and the pixels if asked for.

    A deflated file may unpack to `most_bytes`. `UnreadableImageError` quotes nothing of the header.
    """
    require("pydicom", "dicom", "Reading DICOM needs pydicom")
    if not is_dicom(data):
        raise UnreadableImageError("it is not a DICOM file: DICM is missing at byte 128")
    facts = [_CLASS, _MODALITY, _VIEW, _IMAGE_LATERALITY, _LATERALITY, _PATIENT, _STUDY, *_SPACINGS]
    parsed, refusal = None, "its DICOM header is damaged"
    try:
        with _quiet():
            parsed = _parse(data, [*facts, *tags], most_bytes, pixels)
    except UnreadableImageError as error:  # in words of this package
        refusal = str(error)
    except (EOFError, struct.error):
        refusal = f"{_CUT} within its header"
    except Exception:
        pass
    if parsed is None:  # raised out here, so that no exception that quotes the header is attached
        raise UnreadableImageError(refusal)
    return parsed


def _parse(data: bytes, tags: list[int], most_bytes: int, pixels: bool) -> tuple[str, Dataset, PixelField | None]:
    from pydicom.filereader import read_dataset

    file = io.BytesIO(data)
    file.seek(132 if data[128:132] == b"DICM" else 0)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    syntax = text(meta, _TRANSFER_SYNTAX)
    if syntax == _DEFLATED:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        data = inflater.decompress(file.read(), most_bytes)
        if not inflater.eof:
            too_large = f"it unpacks to more than {most_bytes} bytes"
            raise UnreadableImageError(too_large if inflater.unconsumed_tail else f"{_CUT} too early")
        file = io.BytesIO(data)
    if not syntax:  # older files have no meta information, and write their fields as one of three syntaxes says
        implicit, order = _layout_of(data[file.tell() : file.tell() + 132]) or (True, "little")
        syntax = _IMPLICIT if implicit else _BIG_ENDIAN if order == "big" else _EXPLICIT
    big_endian, implicit = syntax == _BIG_ENDIAN, syntax == _IMPLICIT  # if that is wrong, pydicom sees it
    dataset = read_dataset(
        file, implicit, not big_endian, stop_when=lambda tag, vr, length: tag >= _PIXELS, specific_tags=tags
    )
    elements = list(dataset.elements())
    raw = [element for element in elements if isinstance(element.value, bytes)]
    if file.tell() > len(data) or any(len(one.value) < one.length < _UNDEFINED for one in raw):
        raise EOFError
    for element in elements:  # sequences are read now, as long as pydicom is silent
        if element.VR == "SQ" or (element.VR is None and element.tag in _SEQUENCES):
            dataset[element.tag]
    if _CLASS not in dataset and _MEDIA_CLASS in meta:
        dataset[_CLASS] = meta.get_item(_MEDIA_CLASS)._replace(tag=_CLASS)
    field = _pixel_field(data, file.tell(), syntax) if pixels else None
    return syntax, dataset, field


def _pixel_field(data: bytes, start: int, syntax: str) -> PixelField | None:
    """The pixels that begin at a byte; None if there are none. A missing end of the fragments is forgiven."""

    order = "big" if syntax == _BIG_ENDIAN else "little"

    def number(place: int, size: int = 4) -> int:
        return int.from_bytes(data[place : place + size], order)

    if len(data) - start < 12 or (number(start, 2) << 16 | number(start + 2, 2)) != _PIXELS:
        return None
    explicit = data[start + 4 : start + 6] in (b"OB", b"OW", b"UN")  # also if the syntax says otherwise
    kind = data[start + 4 : start + 6].decode() if explicit else "OW"
    place = start + (12 if explicit else 8)
    length = number(place - 4)
    if length != _UNDEFINED:
        value = data[place : place + length]
        if len(value) < length:
            raise UnreadableImageError(f"{_CUT} within its pixels, after {len(value)} of {length} bytes")
        return PixelField(kind, value, [])
    fragments: list[bytes] = []
    while (tag := data[place : place + 4]) == _ITEM and len(data) - place >= 8:
        length = number(place + 4)
        fragments.append(data[place + 8 : place + 8 + length])
        if len(fragments[-1]) < length:
            raise UnreadableImageError(f"{_CUT} within its pixels")
        place += 8 + length
    # Without the end, the end mark of a codestream tells that no fragment is missing; a frame of RLE has only one.
    whole = fragments[1:] and (syntax == _RLE or fragments[-1].rstrip(b"\0").endswith(b"\xff\xd9"))
    if tag != _SEQUENCE_END and not whole:
        raise UnreadableImageError(f"{_CUT} within its pixels" if len(data) - place < 8 else "its pixels are damaged")
    return PixelField(kind, b"", fragments[1:], len(fragments[0]) // 4 if fragments else 0)


# Modality LUT and VOI LUT sequences, for files that do not name the type of a field.
_SEQUENCES = (0x00283000, 0x00283010)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep pydicom silent, whose warnings and log quote values. Filters are of the whole process, hence the lock."""
    log = logging.getLogger("pydicom")
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.addFilter(_drop)
        try:
            yield
        finally:
            log.removeFilter(_drop)


def _drop(record: logging.LogRecord) -> bool:
    return False


def _value(dataset: Dataset, tag: int) -> Any:
    """A field as it is in the file (bytes), or as who made the data set put it there; None if it is missing."""
    return dataset.get_item(tag).value if tag in dataset else None


def text(dataset: Dataset, tag: int) -> str:
    """A field of text without the space around it; empty if it is missing."""
    value = _value(dataset, tag)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    return "" if value is None else str(value).strip(" \0")


def decimals(dataset: Dataset, tag: int) -> list[float]:
    """The numbers in a field of decimal text; an empty list if one of them is not a finite number."""
    value = _value(dataset, tag)
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace").strip(" \0").split("\\")
    elif value is None or isinstance(value, str | int | float):
        value = [] if value is None else [value]
    try:
        numbers = [float(number) for number in value]
    except (TypeError, ValueError):
        return []
    return numbers if all(map(math.isfinite, numbers)) else []


def integers(dataset: Dataset, tag: int, signed: bool = False) -> list[int]:
    """The 16-bit numbers in a binary field."""
    value = _value(dataset, tag)
    if isinstance(value, bytes):
        element = dataset.get_item(tag)
        order = "<" if getattr(element, "is_little_endian", True) else ">"
        return np.frombuffer(value[: len(value) // 2 * 2], f"{order}{'i' if signed else 'u'}2").tolist()
    if value is None:
        return []
    return [int(number) for number in ([value] if isinstance(value, int) else value)]


def items(dataset: Dataset, tag: int) -> list[Dataset]:
    """The items of a sequence."""
    return list(_value(dataset, tag) or [])


def _spacing(dataset: Dataset, tag: int) -> list[float] | None:
    """Two plausible distances in mm, or None: a date or an id would not pass for one."""
    spacing = decimals(dataset, tag)
    plausible = len(spacing) == 2 and all(0 < distance <= _LARGEST_SPACING for distance in spacing)
    return [round(distance, 4) for distance in spacing] if plausible else None
