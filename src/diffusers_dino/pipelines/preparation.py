"""How the images were prepared that a model was trained on: noted with its weights, and followed where it is used."""

from __future__ import annotations

import os
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from diffusers import DiffusionPipeline, ModelMixin, UNet2DConditionModel

from ..data import ImageDataset, Preprocessing, open_images
from ..data.images.preprocessing import border_window

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "TrainedModel",
    "cut_as_in_training",
    "note_preparation",
    "open_images_for",
    "preparation_for",
    "read_preparation",
    "stored_preparation",
]

# A pipeline, its folder, its repository, or what was stored of it.
TrainedModel = DiffusionPipeline | Preprocessing | str | os.PathLike[str]
_NOTE = "_images"  # in the denoiser's config, which diffusers keeps, saves and passes on without reading it
# What cannot be chosen today, so that models of a later version with a choice are told from those of this one.
_FIXED = {"crop": "central square", "polarity": "air is dark"}


def note_preparation(denoiser: ModelMixin, preprocessing: Preprocessing, channels: int) -> None:
    """Note in the config of a UNet or transformer, which is saved with it, how its training images are prepared.

    `channels` are those of the autoencoder's images: 1 for gray, 3 for RGB.
    """
    denoiser.register_to_config(**{_NOTE: {**asdict(preprocessing), **_FIXED, "channels": channels}})


def stored_preparation(model: TrainedModel | None, revision: str | None = None) -> Preprocessing | None:
    """What `note_preparation` noted, of a pipeline, its folder or its repository; None for models from before that.

    None also for pipelines of others, and for those without a denoiser. What was stored elsewhere, such as with a
    synthetic set, or None, is returned as it is. `revision` is that of a repository.
    """
    if model is None or isinstance(model, Preprocessing):
        return model
    if isinstance(model, DiffusionPipeline):
        denoiser = getattr(model, "denoiser", None)
        config = {} if denoiser is None else denoiser.config
    else:
        parts = DiffusionPipeline.load_config(str(model), revision=revision)
        names = [name for name in ("unet", "transformer") if (parts.get(name) or [None])[0]]
        if not names:
            return None
        config = UNet2DConditionModel.load_config(str(model), subfolder=names[0], revision=revision)  # of any model
    return read_preparation(config)


def read_preparation(config: Mapping[str, Any]) -> Preprocessing | None:
    """As `stored_preparation`, from the denoiser's config; ValueError if the note is not one of this version."""
    noted = config.get(_NOTE)
    if noted is None:
        return None
    names = {field.name for field in fields(Preprocessing)}
    try:
        if any(noted[name] != value for name, value in _FIXED.items()) or set(noted) - names - {*_FIXED, "channels"}:
            raise ValueError("it has settings that this version of diffusers-dino does not know")
        return Preprocessing(**{name: noted[name] for name in names})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The model's config does not say how to prepare images ({_NOTE}): {error}.") from error


def preparation_for(model: TrainedModel | None, size: int, remove_borders: bool | None = None) -> Preprocessing:
    """How to prepare images at a side of `size` pixels for a model: as those that it was trained on.

    ValueError if `remove_borders` contradicts what the model was trained with: samples and figures of other images
    than it knows would say nothing, without looking wrong. Also if neither says it.
    """
    stored = stored_preparation(model)
    if stored is None and remove_borders is None:
        raise ValueError(
            "The model does not say whether borders were cut off the images that it was trained on, as it is of an "
            "older version: give remove_borders as in its training (its card or training_arguments.json may tell)."
        )
    if stored is None:
        return Preprocessing(size, remove_borders)
    if remove_borders not in (None, stored.remove_borders):
        raise ValueError(
            f"The model was trained with remove_borders={stored.remove_borders}, and remove_borders={remove_borders} "
            "asks for other images than it knows: leave it out, and images are prepared as in training."
        )
    return replace(stored, size=size)


def open_images_for(
    model: TrainedModel, source: str | os.PathLike[str], size: int, remove_borders: bool | None = None, **options: Any
) -> ImageDataset:
    """Open images that are prepared by `preparation_for`; `options` are those of `data.open_images`.

    Images that have been prepared already, as their shards say, are only resized, also for a model that does not say
    how.
    """
    stored = stored_preparation(model)
    if remove_borders is None and stored is None:
        earlier = open_images(source, Preprocessing(size), **{**options, "in_memory": False}).store.prepared_by
        if earlier is not None:
            return open_images(source, replace(earlier, size=size), **options)
    return open_images(source, preparation_for(stored, size, remove_borders), **options)


def cut_as_in_training(model: DiffusionPipeline, image: PIL.Image.Image) -> PIL.Image.Image:
    """An image that somebody opened, without its borders if the model was trained on images without theirs."""
    stored = stored_preparation(model)
    if stored is None or not stored.remove_borders:
        return image
    rows, columns = border_window(np.asarray(image), stored.border_tolerance)
    return image.crop((columns.start, rows.start, columns.stop, rows.stop))
