"""What experiments compare a model with: itself before training, shuffled pairs, halves, images it has not seen."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..pixels import unit_to_uint8, with_channels
from ..seeds import generator_for, seeded

__all__ = ["derangement", "rows_in", "split_in_halves", "warn_of_training_images", "with_fresh_unet"]

logger = logging.getLogger(__name__)

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def with_fresh_unet(pipe: Pipeline, seed: int = 0) -> Pipeline:
    """The same pipeline with an untrained denoiser of the same config; the pipeline that is given stays as it is."""
    with seeded(seed):
        fresh = type(pipe.denoiser).from_config(pipe.denoiser.config)
    fresh.requires_grad_(False).eval().to(pipe.denoiser.device)
    if fresh.dtype != pipe.denoiser.dtype:
        fresh.to(pipe.denoiser.dtype)
    untrained = type(pipe)(**{**pipe.components, pipe.denoiser_name: fresh})
    untrained.set_progress_bar_config(disable=True)
    return untrained


def derangement(n: int, seed: int) -> Tensor:
    """A permutation `(n,)` without fixed points: a cycle through a random order."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    cycle = torch.empty_like(order)
    cycle[order] = order.roll(1)
    return cycle


def split_in_halves(patients: Sequence[str], seed: int = 0) -> Tensor:
    """Whether each image is in the first half of the patients: `(N,)` bool; ValueError if there is only one."""
    names = sorted(set(patients))
    if len(names) < 2:
        raise ValueError(f"Choosing on one half and scoring on the other needs two patients, got {len(names)}.")
    order = torch.randperm(len(names), generator=generator_for(seed, "halves")).tolist()
    first = {names[i] for i in order[: len(names) // 2]}
    return torch.tensor([patient in first for patient in patients])


def rows_in(rows: Tensor, others: Tensor) -> Tensor:
    """Which rows `(N, ...)` are among others `(M, ...)`, to the bit: `(N,)` bool."""
    known = {hash(row.tobytes()) for row in others.cpu().numpy()}
    return torch.tensor([hash(row.tobytes()) in known for row in rows.cpu().numpy()], dtype=torch.bool)


def warn_of_training_images(images: Tensor, training_images: Tensor) -> None:
    """Warn if images `(N, C, H, W)` that a model must not have seen are among those it was trained on."""
    seen = int(rows_in(*(unit_to_uint8(with_channels(x, 1)) for x in (images, training_images))).sum())
    if seen:
        logger.warning(
            "%d of %d images are among the training images, pixel by pixel: figures are not those of unseen images.",
            seen,
            len(images),
        )
