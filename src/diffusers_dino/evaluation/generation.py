"""What protocols do with a model: load it, embed images by it, and generate images of reproducible noise."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from ..conditioner import DinoImageConditioner
from ..data import ImageDataset, collate
from ..data.datasets import to_float
from ..seeds import generator_for
from .packed import readable_images

if TYPE_CHECKING:
    from ..pipelines import DinoDiffusionPipeline

__all__ = [
    "Model",
    "StackedImages",
    "embed_images",
    "generate_batches",
    "generate_variations",
    "load_models",
    "models_of",
    "stack_images",
    "stack_readable",
]


logger = logging.getLogger(__name__)


class Model(NamedTuple):
    """A model to measure.

    Attributes:
        name: For tables.
        pipe: Its pipeline.
        step: Updates after which a checkpoint of a run was saved.
        checkpoint: Name of this state of the model, where several states of one model are swept.
    """

    name: str
    pipe: DiffusionPipeline
    step: int | None = None
    checkpoint: str = ""


def models_of(models: DiffusionPipeline | Iterable[Model]) -> Iterable[Model]:
    """The models to measure: several, or a single pipeline, which is called "model"."""
    return [Model("model", models)] if isinstance(models, DiffusionPipeline) else models


def load_models(
    paths: Iterable[tuple[str, str | PathLike[str]]],
    steps: Mapping[str, int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Iterator[Model]:
    """Load pipelines, or checkpoints of a run, one after the other.

    `paths` are the name and folder of each, `steps` the updates of those that are checkpoints, by name.
    """
    from ..training.models import load_trained_pipeline

    for name, path in paths:
        yield Model(name, load_trained_pipeline(path, dtype).to(device), (steps or {}).get(name))


def stack_images(images: ImageDataset | Tensor) -> Tensor:
    """All images of a data set as `(N, C, size, size)` in [0, 1]; a tensor is returned as it is.

    Images that cannot be read are left out, with a warning that counts them; ValueError if none is left.
    """
    stacked = stack_readable(images).images
    if not len(stacked) and not isinstance(images, Tensor):
        raise ValueError(f"None of {len(images)} images can be read.")
    return stacked


class StackedImages(NamedTuple):
    """Images `(n, C, size, size)` in [0, 1], their numbers in the collection that they are of, and their keys."""

    images: Tensor
    rows: list[int]
    keys: list[str]


def stack_readable(images: ImageDataset | Tensor) -> StackedImages:
    """The images of a collection that can be read, of which there may be none; the keys of a tensor are numbers."""
    if isinstance(images, Tensor):
        numbers = list(range(len(images)))
        return StackedImages(images, numbers, list(map(str, numbers)))
    found = list(_samples(images))
    if len(found) < len(images):
        logger.warning("%d of %d images cannot be read and are left out.", len(images) - len(found), len(images))
    stacked = collate(found)["image"] if found else torch.empty(0, 1, 1, 1)
    return StackedImages(stacked, [sample["place"] for sample in found], [sample["key"] for sample in found])


def embed_images(
    model: DinoDiffusionPipeline | DinoImageConditioner, images: ImageDataset | Tensor, batch_size: int = 64
) -> Tensor:
    """Condition tokens `(N, S, D)`, float32 on the CPU, of a data set or of `(N, C, H, W)` in [0, 1].

    Images of a data set pass through memory a batch at a time. ValueError if one cannot be read: whoever takes a row
    for each key would take that of another image.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    batches = images.split(batch_size) if isinstance(images, Tensor) else _batches(images, batch_size)
    encode = model.encode if isinstance(model, DinoImageConditioner) else model.encode_image
    tokens = torch.cat([encode(batch).float().cpu() for batch in batches])
    if len(tokens) < len(images):
        raise ValueError(f"{len(images) - len(tokens)} of {len(images)} images cannot be read: leave them out.")
    return tokens


def _samples(images: ImageDataset) -> Iterator[dict[str, Any]]:
    return ({"place": n, "key": key, "image": to_float(array)} for n, key, array in readable_images(images))


def _batches(images: ImageDataset, batch_size: int) -> Iterator[Tensor]:
    left = _samples(images)
    while samples := list(islice(left, batch_size)):
        yield collate(samples)["image"]


def generate_batches(
    pipe: DiffusionPipeline,
    tokens: Tensor | Mapping[str, Tensor],
    keys: Sequence[int | str],
    noise: tuple[int, str],
    batch_size: int,
    progress: bool = True,
    **call: Any,
) -> Iterator[Tensor]:
    """One image from each row of `tokens` `(N, S, D)`: batches `(n, C, H, W)` float32 in [0, 1].

    The noise of an image depends only on `noise`, the seed and purpose of the draw, and the key of its row. `tokens`
    of several arguments of a pipeline are given by their names; `call` are its further arguments.
    """
    tokens = tokens if isinstance(tokens, Mapping) else {"image_embeds": tokens}
    pipe.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(keys), batch_size), unit="batch", leave=False, disable=not progress):
        chunk = slice(start, start + batch_size)
        generators = [generator_for(*noise, key) for key in keys[chunk]]
        own = {name: rows[chunk] for name, rows in tokens.items()}
        yield pipe(**own, generator=generators, output_type="pt", **call).images.float()


def generate_variations(
    pipe: DinoDiffusionPipeline,
    tokens: Tensor,
    seed: int,
    *,
    num_inference_steps: int = 20,
    guidance_scale: float = 2.0,
    guidance_rescale: float = 0.0,
    batch_size: int = 64,
    progress: bool = True,
) -> Tensor:
    """One image from each row of `tokens` `(N, S, D)`, which depends only on (row, seed): `(N, C, H, W)` in [0, 1]."""
    call = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "guidance_rescale": guidance_rescale,
    }
    batches = generate_batches(pipe, tokens, range(len(tokens)), (seed, "variation"), batch_size, progress, **call)
    return torch.cat([images.cpu() for images in batches])
