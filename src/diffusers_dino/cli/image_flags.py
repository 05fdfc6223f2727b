"""Which real images a command uses, what is known of them, and which a model has not seen: flags of several."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from diffusers import DiffusionPipeline

from ..data import ImageDataset, Preprocessing, open_images
from ..data.keys import read_keys
from ..data.labels import LabelTable, read_label_table, stored_labels
from ..pipelines.preparation import TrainedModel, open_images_for, preparation_for
from ..synthesis import SyntheticSet
from .arguments import flag

__all__ = [
    "BORDERS",
    "STORED",
    "HeldOutArguments",
    "RealImageArguments",
    "check_arguments",
    "open_real_images",
    "open_training_and_held_out",
    "prepared_as_sources",
    "read_patients",
]

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


@dataclass
class HeldOutArguments:
    training: str | None = flag(
        None, "What the generator was trained on: a folder, or webdataset tars.", group="Images"
    )
    held_out: str | None = flag(None, "Real images that it was not trained on, likewise.")
    training_keys: str | None = flag(None, "Text file of the keys of --training to use, one a line.")
    held_out_keys: str | None = flag(None, "The same for --held_out; by default what --training_keys does not list.")
    patients: str | None = flag(None, "CSV table with the patient of each real image, or `stored` in the shards.")
    key_column: str = flag("file", "Its column of keys or file names.")
    patient_column: str = flag("patient", "Its column of patients.")
    remove_borders: bool | None = flag(None, BORDERS)


def check_arguments(args: HeldOutArguments) -> None:
    """ValueError unless the training images are named."""
    if not args.training:
        raise ValueError("Give --training: the images that the generator was trained on.")


def open_training_and_held_out(
    args: HeldOutArguments, size: int, model: DiffusionPipeline | str | None = None
) -> tuple[ImageDataset, ImageDataset | None]:
    """Training and held-out images, at this side in pixels; what trained is never held out.

    They are prepared as for training the `model`; without one, borders are left on unless the flag says otherwise.
    """
    if model is None:
        preprocessing = Preprocessing(size, bool(args.remove_borders))
    else:
        preprocessing = preparation_for(model, size, args.remove_borders)
    training = open_images(args.training, preprocessing)
    if args.training_keys:
        training = training.select(read_keys(args.training_keys))
    if not args.held_out:
        return training, None
    held_out, trained = open_images(args.held_out, preprocessing), set(training.keys)
    is_same = os.path.realpath(args.held_out) == os.path.realpath(args.training)
    if args.held_out_keys:
        held_out = held_out.select(read_keys(args.held_out_keys))
        if is_same and (both := sorted(trained & set(held_out.keys))):
            raise ValueError(
                f"{len(both)} of the held-out images are training images, such as {both[0]}: --held_out_keys and "
                "--training_keys must not have keys in common."
            )
    elif args.training_keys or is_same:
        held_out = held_out.select([key for key in held_out.keys if key not in trained])
    if not len(held_out):
        raise ValueError("No image is held out: the training set has all keys of --held_out.")
    return training, held_out


def read_patients(args: HeldOutArguments, images: ImageDataset | None) -> tuple[str, ...] | None:
    if not args.patients or images is None:
        return None
    if args.patients == STORED:
        return stored_labels(images).patients
    return read_label_table(args.patients, args.key_column, None, args.patient_column).select(images.keys).patients
