"""Prepared images on their way into shards: the shard of each depends on duplicates, known only when all are prepared.

So each image is prepared once and kept with its facts in a part: `000000.bin` holds the bytes of its images,
`000000.json`, written last, their facts. Neither parts nor shards hold ids, file names or headers of the originals.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError

from ...files import atomic_write, mark_of, read_json, write_json
from ..images.dicom_header import dicom_facts, is_dicom, salted_hash
from ..images.encoding import Encoding
from ..images.errors import NoImageError, UnreadableImageError
from ..images.preprocessing import refuse_blank
from ..images.reading import read_image
from ..keys import unify
from ..sources import Record
from ..sources.masks import unite_masks
from ..sources.records import salted_key
from .duplicates import perceptual_hash, pixel_digest
from .manifest import Shard, ShardError, shard_problem, write_shard

__all__ = [
    "Item",
    "Sample",
    "Unreadable",
    "assemble_shard",
    "file_mark",
    "has_changed",
    "is_complete",
    "list_items",
    "prepare",
    "read_contents",
    "read_part",
    "write_part",
]


@dataclass(frozen=True, slots=True)
class Item:
    """An image to prepare. From here on, salted hashes stand for its id (`key`) and its patient."""

    key: str
    patient: str
    record: Record


@dataclass(frozen=True, slots=True)
class Sample:
    """What is known of a prepared image, and where its bytes are. Nothing else of the original is kept.

    See `Item` and `Record` for what is not said here. `modality` is DICOM's term, such as `"DX"`; `spacing` is in mm
    between rows and between columns of the prepared image; `size` is the original's, height and width; `digest` and
    `hash` (hexadecimal) are those of `duplicates`. `files` are extension -> offset and length within the part number
    `part`, `checksum` is the CRC-32 of those bytes. `mark` is the `file_mark` of the original as it was read;
    `nameless`: it is a DICOM file without a patient's id. None in parts of older versions.
    """

    key: str
    source: str
    patient: str
    labels: tuple[str, ...] | None
    uncertain: tuple[str, ...]
    view: str | None
    split: str | None
    modality: str | None
    spacing: tuple[float, float] | None
    size: tuple[int, int]
    digest: str
    hash: str
    files: dict[str, tuple[int, int]]
    checksum: int
    part: int
    mark: str | None = None
    nameless: bool | None = None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An image that is left out, and the reason, which quotes nothing from the file.

    `no_image`: it is a sound file of another kind, such as a report, which does not count as damaged.
    """

    key: str
    source: str
    reason: str
    mark: str | None = None
    no_image: bool = False


FOLDER = "images"  # name of a plain folder as a source; further ones have a number after it
_COLUMNS = [entry.name for entry in fields(Sample) if entry.name != "part"]  # the last two may be missing


def list_items(records: Iterable[Record], salt: str) -> list[Item]:
    """The images of a source in the order of their ids, with hashes for names; `ValueError` if two have one id."""
    records = sorted(records, key=lambda record: record.image_id)
    items = []
    for record, patient in zip(records, unify([record.patient for record in records]), strict=True):
        key = salted_key(record.source, record.image_id, salt)
        items.append(Item(key, salted_hash(f"{record.source}/{patient}", salt), record))
    if len({item.key for item in items}) < len(items):
        raise ValueError(f"Images of {items[0].record.source} share an id: an id names one image.")
    return items


def prepare(item: Item, encoding: Encoding, salt: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Read and prepare one image: the facts of its `Sample`, and its files by extension.

    If the source has no patient ids, the patient is that of the DICOM header, hashed with the salt.
    """
    record = item.record
    original = read_image(record.image, item.key, raw=record.raw, inverted=record.invert)
    header = _header_facts(record, salt)
    facts = header or {}
    image = encoding.preprocessing(original)
    refuse_blank(image)
    window = encoding.preprocessing.window(original)
    side = window[0].stop - window[0].start
    spacing = [round(mm * side / len(image), 4) for mm in facts["spacing"]] if "spacing" in facts else None
    files = {encoding.format: encoding.encode(image)}
    if record.masks:
        masks = unite_masks([("its mask", _read_mask(path)) for path in record.masks], original.shape[:2])
        mask = encoding.preprocessing.prepare_mask(masks, window)
        files["mask.png"] = Encoding(encoding.preprocessing, "png").encode(mask)
    known = {
        "key": item.key,
        "source": record.source,
        "patient": facts.get("patient", item.patient),
        "labels": record.labels,
        "uncertain": record.uncertain,
        "view": record.view or facts.get("view"),
        "split": record.split,
        "modality": facts.get("modality"),
        "spacing": spacing,
        "size": original.shape[:2],
        "digest": pixel_digest(image),
        "hash": perceptual_hash(image).hex(),
        "nameless": header is not None and not record.names_patient and "patient" not in header,
    }
    return known, files


def write_part(folder: Path, number: int, items: Sequence[Item], encoding: Encoding, salt: str) -> tuple[int, int]:
    """Prepare some images and write them as one part: how many there are, and how many of them are damaged."""
    rows: list[list[Any]] = []
    unreadable: list[Unreadable] = []
    with atomic_write(_blob(folder, number)) as blob:
        for item in items:
            mark = file_mark(item.record)
            try:
                known, files = prepare(item, encoding, salt)
            except (UnreadableImageError, ValueError, OSError) as error:
                no_image = isinstance(error, NoImageError)
                unreadable.append(Unreadable(item.key, item.record.source, _reason(error), mark, no_image))
                continue
            known |= {"files": {}, "checksum": 0, "mark": mark}
            for extension, content in files.items():
                known["files"][extension] = (blob.tell(), len(content))
                known["checksum"] = zlib.crc32(content, known["checksum"])
                blob.write(content)
            rows.append([known[column] for column in _COLUMNS])
        size = blob.tell()
    facts = {"bytes": size, "samples": rows, "unreadable": list(map(astuple, unreadable))}
    write_json(_facts(folder, number), facts, indent=None)
    return len(items), sum(not one.no_image for one in unreadable)


def file_mark(record: Record) -> str:
    """The `mark_of` an image's file and its masks."""
    return mark_of((record.image, *record.masks))


def has_changed(sample: Sample, record: Record) -> bool:
    """Whether a prepared image's file is now of another size."""
    return sample.mark is not None and sample.mark.split()[0] != "+".join(
        str(path.stat().st_size) if path.is_file() else "-1" for path in (record.image, *record.masks)
    )


def is_complete(folder: Path, number: int) -> bool:
    """Whether a part is there and has the right size."""
    try:
        return _blob(folder, number).stat().st_size == read_json(_facts(folder, number))["bytes"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def read_part(folder: Path, number: int) -> tuple[list[Sample], list[Unreadable]]:
    """The facts of a part's samples, and its unreadable images."""
    try:
        content = read_json(_facts(folder, number))
        samples = [Sample(**dict(zip(_COLUMNS, row, strict=False)), part=number) for row in content["samples"]]
        return samples, [Unreadable(*row) for row in content["unreadable"]]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, number) from error


def assemble_shard(name: str, split: str, samples: Sequence[Sample], parts: Path, folder: Path, done: Path) -> Shard:
    """Copy a shard together from parts, unless it is there already and matches its record in the folder `done`."""
    record = done / f"{name}.json"
    with suppress(FileNotFoundError, ValueError, TypeError):  # without a sound record it is written anew
        shard = Shard(**read_json(record))
        if shard.name == name and shard_problem(folder, asdict(shard)) is None:
            return shard
    shard = write_shard(folder / name, split, _with_facts(samples, split, parts))
    write_json(record, asdict(shard))
    return shard


def read_contents(sample: Sample, parts: Path) -> dict[str, bytes]:
    """The prepared image of a sample, and its mask if it has one, by extension; `ShardError` if they are damaged."""
    contents, checksum = {}, 0
    with open(_blob(parts, sample.part), "rb") as blob:
        for extension, (offset, length) in sample.files.items():
            blob.seek(offset)
            contents[extension] = blob.read(length)
            checksum = zlib.crc32(contents[extension], checksum)
    if checksum != sample.checksum:
        raise _damaged(parts, sample.part)
    return contents


def _damaged(parts: Path, number: int) -> ShardError:
    names = f"{_blob(parts, number)} and {_facts(parts, number).name}"
    return ShardError(f"A part is damaged: delete {names} and run the same command again.")


def _with_facts(samples: Iterable[Sample], split: str, parts: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and files of each sample, with the facts that a shard may hold."""
    shared = ("source", "patient", "labels", "uncertain", "view", "modality", "spacing", "size")
    for sample in samples:
        facts = {name: getattr(sample, name) for name in shared} | {"split": split}
        yield sample.key, read_contents(sample, parts) | {"json": json.dumps(facts, separators=(",", ":")).encode()}


def _header_facts(record: Record, salt: str) -> dict[str, Any] | None:
    """What is taken from the header of a DICOM file; None for other files, of which nothing is taken."""
    with open(record.image, "rb") as file:
        if record.raw is not None or not is_dicom(file.read(132)):
            return None
    facts = dicom_facts(record.image, salt)
    if not record.names_patient and "patient" in facts:
        scope = re.sub(rf"^{FOLDER}\d+$", FOLDER, record.source)  # a patient may be in several of the plain folders
        return facts | {"patient": salted_hash(f"{scope}/{facts['patient']}", salt)}
    return {name: value for name, value in facts.items() if name != "patient"}


def _read_mask(path: Path) -> np.ndarray:
    try:
        return read_image(path, "its mask")
    except UnreadableImageError as error:
        reason = f"its mask: {_reason(error)}"
    raise UnreadableImageError(reason)  # out here it has no context, which would hide whose fault it is


def _reason(error: Exception) -> str:
    """What is wrong with a file, without its content: decoders quote it in their messages."""
    cause = error.__cause__ or error.__context__ or error
    if isinstance(cause, UnreadableImageError):
        return str(cause)
    if isinstance(cause, UnidentifiedImageError):
        return "it is not an image of a known format"
    if isinstance(cause, FileNotFoundError | PermissionError | IsADirectoryError):
        return cause.strerror or type(cause).__name__
    return f"it is damaged ({type(cause).__name__})"


def _blob(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.bin"


def _facts(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.json"
