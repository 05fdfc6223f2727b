"""Which images a model was trained on and which it has not seen: the flags that several commands share."""

from __future__ import annotations

import os
from dataclasses import dataclass

from diffusers import DiffusionPipeline

from ..data import ImageDataset, Preprocessing, open_images
from ..data.keys import read_keys
from ..data.labels import read_label_table, stored_labels
from ..pipelines.preparation import preparation_for
from .arguments import flag
from .image_flags import BORDERS

__all__ = ["HeldOutArguments", "check_arguments", "open_training_and_held_out", "read_patients"]


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
    if args.patients == "stored":
        return stored_labels(images).patients
    return read_label_table(args.patients, args.key_column, None, args.patient_column).select(images.keys).patients
