"""The three pipelines behind one face, for tests of what diffusers asks of every pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

import tiny
from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline, DinoInterpolationPipeline


@dataclass(frozen=True)
class Kind:
    """One pipeline, and what runs it: `run(pipe, images, **options)`.

    That gives one result for each image, always from the same noise: an image, or maps of attention.
    """

    pipeline: type[DiffusionPipeline]
    run: Callable[..., np.ndarray]
    generates: bool = True

    def make(self, **components: Any) -> DiffusionPipeline:
        return self.pipeline.from_pipe(tiny.tiny_pipeline(**components))


def _seeds(count: int) -> list[torch.Generator]:
    return tiny.generators(*range(count))


def _generate(pipe: DiffusionPipeline, *given: Any, count: int, **options: Any) -> Any:
    defaults = {"num_inference_steps": 2, "output_type": "np", "return_dict": False, "generator": _seeds(count)}
    return pipe(*given, **{**defaults, **options})[0]


def _vary(pipe: DiffusionPipeline, images: torch.Tensor, **options: Any) -> Any:
    return _generate(pipe, images, count=len(images), **options)


def _blend(pipe: DiffusionPipeline, images: torch.Tensor, **options: Any) -> Any:
    """Half way from each image to a fixed one, so that a batch is its images."""
    target = tiny.random_images(1, seed=1).expand(len(images), -1, -1, -1).to(images.dtype)
    return _generate(pipe, images, target, [0.5], count=len(images), **options)


def _segment(pipe: DiffusionPipeline, images: torch.Tensor, **options: Any) -> np.ndarray:
    """The maps that the masks are made of: random weights attend almost evenly, where rounding moves masks."""
    masks, merged, _ = pipe(images, merge_threshold=0.3, relative_threshold=True, return_dict=False, **options)
    assert masks.shape == (len(images), 32, 32)
    return np.stack([maps.mean(0).cpu().numpy() for maps in merged])


def bare_stable_diffusion(pipe: DiffusionPipeline) -> StableDiffusionPipeline:
    """diffusers' own pipeline on the same UNet, VAE and schedule: an independent implementation of the sampling."""
    empty = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return StableDiffusionPipeline(
        pipe.vae, unet=pipe.unet, scheduler=scheduler, **empty, requires_safety_checker=False
    )


KINDS = {
    "diffusion": Kind(DinoDiffusionPipeline, _vary),
    "interpolation": Kind(DinoInterpolationPipeline, _blend),
    "segmentation": Kind(DiffSegPipeline, _segment, generates=False),
}
