"""Which real images a command uses, and what is known of them: the flags that several commands share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..data import ImageDataset, Preprocessing, open_images
from ..data.keys import read_keys
from ..data.labels import LabelTable, read_label_table, stored_labels
from ..pipelines.preparation import TrainedModel, open_images_for
from ..synthesis import SyntheticSet
from .arguments import flag

__all__ = ["BORDERS", "STORED", "RealImageArguments", "open_real_images", "prepared_as_sources"]

STORED = "stored"
BORDERS = "Whether uniform borders are cut off real images; by default as in the model's training, which it remembers."


@dataclass
class RealImageArguments:
    data_dir: str = flag("examples/data/phantom-cxr", "Real images: a folder, or webdataset tars.", group="Data")
    data_split: str = flag("train", "Split of a folder of shards with a manifest.")
    keys_file: str | None = flag(None, "Text file of the keys of the images to use, one a line; by default all.")
    labels: str | None = flag(None, f"CSV of labels and patients, or {STORED!r} for those beside images in shards.")
    key_column: str = flag("file", "Column of the CSV: keys or file names.")
    label_column: str = flag("findings", "Column of the CSV: labels, joined by |.")
    patient_column: str = flag("patient", "Column of the CSV: patients.")
    remove_borders: bool | None = flag(None, BORDERS)


def open_real_images(
    args: RealImageArguments, size: int, need_patients: bool = True, model: TrainedModel | None = None
) -> tuple[ImageDataset, LabelTable | None]:
    """The images at this size in pixels, and what is known of each in the same order; None without labels.

    They are prepared as for training the `model`; without one, borders are cut off unless the flag says otherwise.
    Raises ValueError if an image has no row of labels, or a key or column is missing.
    """
    options = {"split": args.data_split, "local_files_only": True}
    if model is None:
        images = open_images(args.data_dir, Preprocessing(size, args.remove_borders is not False), **options)
    else:
        images = open_images_for(model, args.data_dir, size, args.remove_borders, **options)
    try:
        if args.keys_file:
            images = images.select(read_keys(args.keys_file))
        if args.labels is None:
            return images, None
        if args.labels == STORED:
            return images, stored_labels(images)
        patient_column = args.patient_column if need_patients else None
        table = read_label_table(args.labels, args.key_column, args.label_column, patient_column)
        return images, table.select(images.keys)
    except KeyError as error:
        raise ValueError(
            f"{error.args[0]}. Check --keys_file, and name files in --labels as in --data_dir."
        ) from error


def prepared_as_sources(sets: Iterable[str]) -> Preprocessing | None:
    """How the sources of all these sets of `synthesise` were prepared; None for a prior's sets, which have none."""
    found: dict[bool, tuple[str, Preprocessing]] = {}
    for folder in sets:
        made = SyntheticSet.open(folder)
        if made.plan.keys:
            stored = Preprocessing(**made.plan.made_with["preprocessing"])
            found[stored.remove_borders] = folder, stored
    if len(found) > 1:
        raise ValueError(
            f"The sources of {found[True][0]} were prepared without borders, and those of {found[False][0]} with "
            "them: judge these sets apart, each on real images as its own."
        )
    return next((stored for _, stored in found.values()), None)
