"""A finished set for other tools: a `datasets.Dataset`, a data set like TorchXRayVision's, or a plain folder."""

from __future__ import annotations

import logging
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch.utils.data import Dataset

from ..data.labels import plain_label
from ..extras import require
from ..files import read_json, save_atomically, write_csv, write_json
from ..fingerprints import hash_of
from ..pixels import unit_to_xrv
from .dataset import LABELS, SyntheticSet, label_columns, label_rows
from .plan import PlannedImage, SynthesisError

if TYPE_CHECKING:
    import datasets
    import pandas as pd

__all__ = ["XRV_PATHOLOGIES", "XrvStyleDataset", "as_datasets", "export"]

# TorchXRayVision's `default_pathologies`: what its models tell, in their order.
XRV_PATHOLOGIES = (
    "Atelectasis",
    "Consolidation",
    "Infiltration",
    "Pneumothorax",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Effusion",
    "Pneumonia",
    "Pleural_Thickening",
    "Cardiomegaly",
    "Nodule",
    "Mass",
    "Hernia",
    "Lung Lesion",
    "Fracture",
    "Lung Opacity",
    "Enlarged Cardiomediastinum",
)
_NORMAL = {"nofinding", "normal"}  # absence of all
_STAMP = ".exported.json"

logger = logging.getLogger(__name__)


def as_datasets(made: SyntheticSet, cache_dir: str | Path | None = None) -> datasets.Dataset:
    """A set as a `datasets.Dataset` with columns `image`, `key`, `labels`, `strategy`, `sources` and `fraction`.

    Files of images are taken as they are. The labels of unlabelled images are None. A set of soft labels has
    `probabilities` in place of `labels`: a number for each label of the set. It is kept in the cache of
    `datasets`, or in `cache_dir`, and made anew when the set has changed.
    """
    datasets = require("datasets", "train", "A datasets.Dataset needs datasets")
    text = datasets.Value("string")
    columns = {"image": datasets.Image(), "key": text, "strategy": text}
    if made.plan.exponent is None:
        columns["labels"] = datasets.List(text)
    else:
        columns["probabilities"] = dict.fromkeys(_names(made), datasets.Value("float64"))
    columns |= {"sources": datasets.List(text), "fraction": datasets.Value("float64")}
    return datasets.Dataset.from_generator(
        _records,
        features=datasets.Features(columns),
        gen_kwargs={"folder": str(made.folder.resolve()), "version": _version(made)},
        cache_dir=cache_dir and str(cache_dir),
    )


class XrvStyleDataset(Dataset[dict[str, Any]]):
    """A set as TorchXRayVision's data sets are; its `relabel_dataset`, `MergeDataset` and training scripts take it.

    A sample is `{"idx": number, "img": (1, H, W) float32 in [-1024, 1024], "lab": (P,) float32}`. Names of labels are
    compared without case, spaces and underscores. A pathology that no label of the set names is unknown (NaN) in all
    images, as are all pathologies of an unlabelled image.

    Args:
        made: The set.
        pathologies: P names in the order of the labels; by default those of TorchXRayVision's models.
        transform: Of each image, as arrays.

    Attributes:
        labels: `(N, P)` float32: 1 for present, 0 for absent, NaN for unknown; in between for soft labels.

    Raises:
        ValueError: If the set has labels, and none of them is among the pathologies.
    """

    def __init__(
        self,
        made: SyntheticSet,
        pathologies: Sequence[str] = XRV_PATHOLOGIES,
        transform: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.pathologies, self.transform = list(pathologies), transform
        self.labels = _label_matrix(made, self.pathologies)
        self._made, self._images = made, made.images(max_unreadable=0)

    @cached_property
    def csv(self) -> pd.DataFrame:
        """A row for each image, as in `labels.csv`."""
        pandas = require("pandas", "eval", "A table of labels needs pandas")
        return pandas.DataFrame(
            label_rows(self._made.plan, set(self._made.left_out)), columns=list(label_columns(self._made.plan))
        )

    def totals(self) -> dict[str, dict[float, int]]:
        """How many images have each value, by pathology."""
        known = (column[~np.isnan(column)] for column in self.labels.T)
        counts = [
            {value: int((column == value).sum()) for value in sorted({0.0, 1.0, *column.tolist()})} for column in known
        ]
        return dict(zip(self.pathologies, counts, strict=True))

    def string(self) -> str:
        """The name and the number of images, as TorchXRayVision prints them."""
        return f"{type(self).__name__} num_samples={len(self)}"

    __repr__ = string

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = unit_to_xrv(self._images[index]["image"]).numpy()
        return {"idx": index, "lab": self.labels[index], "img": self.transform(image) if self.transform else image}


def export(made: SyntheticSet, kind: Literal["folder", "datasets", "xrv"], folder: str | Path) -> Path:
    """Write a set for other tools, and return the folder. What is there already from the same set stays.

    Args:
        made: The set.
        kind: `"folder"`: `images/KEY.png` (or `.jpg`), and `labels.csv` with their names and what the set's own says.
            `"xrv"`: the same with a column for each of TorchXRayVision's pathologies: 1, 0, or blank for unknown.
            `"datasets"`: what `datasets.load_from_disk` reads.
        folder: Where it goes: a new or empty folder.

    Raises:
        FileExistsError: If the folder holds something else.
    """
    writers = {"folder": _write_folder, "datasets": _write_datasets, "xrv": _write_xrv}
    if kind not in writers:
        raise ValueError(f"A set is exported as {', '.join(writers)}, not {kind!r}.")
    folder, stamp = Path(folder), {"kind": kind, "version": _version(made)}
    if (folder / _STAMP).is_file() and read_json(folder / _STAMP) == stamp:
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds something else: give another folder for the export.")
    with save_atomically(folder) as partial:
        writers[kind](made, partial)
        write_json(partial / _STAMP, stamp)
    return folder


def _write_folder(made: SyntheticSet, folder: Path) -> None:
    names = [Path(path).name for path in _write_images(made, folder / "images")]
    rows = label_rows(made.plan, set(made.left_out))
    header = ("file", *label_columns(made.plan))
    write_csv(folder / LABELS, header, ((name, *row) for name, row in zip(names, rows, strict=True)))


def _write_xrv(made: SyntheticSet, folder: Path) -> None:
    labels = _label_matrix(made, XRV_PATHOLOGIES)
    rows = (
        (path.name, path.stem, *("" if np.isnan(value) else f"{value:g}" for value in row))
        for path, row in zip(_write_images(made, folder / "images"), labels, strict=True)
    )
    write_csv(folder / LABELS, ("file", "key", *XRV_PATHOLOGIES), rows)


def _write_datasets(made: SyntheticSet, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as cache:  # which a kill leaves where the next call clears up
        as_datasets(made, cache).save_to_disk(folder)


def _write_images(made: SyntheticSet, folder: Path) -> Iterator[Path]:
    folder.mkdir()
    for planned, content in _files(made):
        path = folder / f"{planned.key}.{made.plan.settings.format}"
        path.write_bytes(content)
        yield path


def _files(made: SyntheticSet) -> Iterator[tuple[PlannedImage, bytes]]:
    """Each image of a set and its file, as it is in the shards."""
    planned = made.planned()
    for shard in made.manifest["shards"]:
        with tarfile.open(made.folder / shard["name"]) as tar:
            for member in tar:
                if not member.name.endswith(".json"):
                    image = next(planned)
                    if member.name != f"{image.key}.{made.plan.settings.format}":
                        raise SynthesisError(f"{shard['name']} holds {member.name} where {image.key} should be.")
                    yield image, tar.extractfile(member).read()


def _records(folder: str, version: str) -> Iterator[dict[str, Any]]:
    """Rows of a `datasets.Dataset`. `version` is only for its cache."""
    made = SyntheticSet.open(folder)
    for image, content in _files(made):
        if made.plan.exponent is None:
            labels = {"labels": image.labels}
        else:
            labels = {"probabilities": dict.fromkeys(_names(made), 0.0) | image.probabilities}
        yield {
            "image": {"bytes": content, "path": None},
            "key": image.key,
            **labels,
            "strategy": made.plan.strategy,
            "sources": image.sources,
            "fraction": image.fraction,
        }


def _version(made: SyntheticSet) -> str:
    """The same for two sets only if their files are."""
    return hash_of(made.plan.digest, *(shard["sha256"] for shard in made.manifest["shards"]))


def _label_matrix(made: SyntheticSet, pathologies: Sequence[str]) -> np.ndarray:
    """`(N, P)` float32, see `XrvStyleDataset`."""
    columns = {plain_label(name): number for number, name in enumerate(pathologies)}
    names = set(_names(made))
    known = {name: columns[plain_label(name)] for name in names if plain_label(name) in columns}
    others = sorted(name for name in names - set(known) if plain_label(name) not in _NORMAL)
    if others and not known:
        raise ValueError(
            f"None of the set's labels ({', '.join(others[:5])}) is among the pathologies "
            f"({', '.join(pathologies[:5])}, ...): give the names that the set has."
        )
    if others:
        logger.warning("%d labels are not among the pathologies and are left out: %s", len(others), ", ".join(others))
    base = np.full(len(pathologies), np.nan, np.float32)
    base[sorted(set(known.values()))] = 0
    rows = np.full((len(made), len(pathologies)), np.nan, np.float32)
    for row, image in zip(rows, made.planned(), strict=True):
        if image.given is not None:
            row[:] = base
            for label, probability in image.given.items():
                if label in known:
                    row[known[label]] = max(row[known[label]], probability)  # of two spellings of one pathology
    return rows


def _names(made: SyntheticSet) -> list[str]:
    """All labels of a set."""
    return sorted({label for labels in made.plan.label_sets for label in labels})
