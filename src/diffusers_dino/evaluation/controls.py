"""What experiments compare a pipeline with, and how they embed its images."""

from __future__ import annotations

from typing import TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..pipelines.base import DinoPipeline

__all__ = ["derangement", "embed_images", "with_fresh_unet"]

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def embed_images(pipe: DinoPipeline, images: Tensor, batch_size: int = 64) -> Tensor:
    """Condition tokens `(N, S, D)`, float32 on the CPU, of images `(N, C, H, W)` in [0, 1]."""
    return torch.cat([pipe.encode_image(chunk).float().cpu() for chunk in images.split(batch_size)])


def with_fresh_unet(pipe: Pipeline, seed: int = 0) -> Pipeline:
    """The same pipeline with an untrained UNet of the same config; the pipeline that is given stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = type(pipe.unet).from_config(pipe.unet.config)
    unet.requires_grad_(False).eval().to(pipe.unet.device)
    if unet.dtype != pipe.unet.dtype:
        unet.to(pipe.unet.dtype)
    fresh = type(pipe)(**{**pipe.components, "unet": unet})
    fresh.set_progress_bar_config(disable=True)
    return fresh


def derangement(n: int, seed: int) -> Tensor:
    """A permutation `(n,)` without fixed points: a cycle through a random order."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    cycle = torch.empty_like(order)
    cycle[order] = order.roll(1)
    return cycle
